"""Which holder computes: a choice by measured latency and by load.

`Links` keeps for each peer what its replies took: `base_s`, the time of a small message there and
back, and `row_s`, what each further row adds. `choose` shares the rows of one layer out so that the
slowest reply is expected soonest; a peer that already gets a message of this layer costs nothing
more than its rows, so messages stay few. A peer that failed or was late is the last choice for a
while. What was measured long ago counts for less and less, so that a peer which was slow once is
tried again. Everything is decided from the arguments: no clock, no randomness.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from protocols import limits
from protocols.ids import PeerId

SMALL_ROWS = 8  # a message of at most this many rows tells about `base_s`
BASE_S = 0.02  # before anything has been measured
ROW_S = 0.001
MESSAGE_S = 0.0002  # what sending one message more costs the sender
WEIGHT = 0.2  # of a new measurement in the moving average, while the last one is fresh


@dataclass(slots=True)
class Link:
    """What is known of one peer; times are in the clock of `now`."""

    base_s: float = BASE_S
    row_s: float = ROW_S
    rows_in_flight: int = 0
    suspect_until: float = 0.0
    measured_at: float | None = None

    def remembered(self, now: float) -> float:
        """How much of what was measured counts at `now`: 1 at once, half a half-life later."""
        age = 0.0 if self.measured_at is None else max(0.0, now - self.measured_at)
        return float(2.0 ** (-age / limits.link_half_life_s))

    def row_s_at(self, now: float) -> float:
        """`row_s` on its way back to what it is before anything has been measured."""
        return ROW_S + (self.row_s - ROW_S) * self.remembered(now)


class Work(Protocol):
    """Rows for one expert; `protocols.forward.grouping.Need` is one."""

    @property
    def expert(self) -> int:
        """Which expert of its layer."""

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that it is to see."""


W = TypeVar("W", bound=Work)


class Links:
    """What this node has measured of its peers, and how many hedges it may still send."""

    def __init__(self) -> None:
        self._links: dict[PeerId, Link] = {}
        self._hedges = limits.hedge_budget_max

    def link(self, peer: PeerId) -> Link:
        """The record of `peer`, made at first use; the oldest idle ones make room."""
        link = self._links.get(peer)
        if link is None:
            if len(self._links) >= limits.links_max:
                idle = (p for p, known in self._links.items() if not known.rows_in_flight)
                del self._links[next(idle)]
            link = self._links[peer] = Link()
        return link

    def expected_s(self, peer: PeerId, rows: int) -> float:
        """How long `rows` rows to `peer` are expected to take, after what is on the way."""
        link = self.link(peer)
        return link.base_s + link.row_s * (rows + link.rows_in_flight)

    def late_after_s(self, peer: PeerId, rows: int) -> float:
        """When a reply counts as late, so that another holder is asked as well."""
        usual = self.expected_s(peer, rows)
        return max(limits.hedge_s_min, limits.hedge_latencies * usual)

    def sent(self, peer: PeerId, rows: int) -> None:
        """A message is on its way."""
        self.link(peer).rows_in_flight += rows
        self._hedges = min(limits.hedge_budget_max, self._hedges + limits.hedge_budget_per_message)

    def ended(self, peer: PeerId, rows: int) -> None:
        """That message has been answered, has failed, or is no longer waited for."""
        link = self.link(peer)
        link.rows_in_flight = max(0, link.rows_in_flight - rows)

    def chosen_s(self, peer: PeerId, rows: int, now: float) -> float:
        """The same for a choice: the longer nothing was measured, the sooner `peer` is tried."""
        link = self.link(peer)
        return link.base_s * link.remembered(now) + link.row_s_at(now) * (
            rows + link.rows_in_flight
        )

    def measured(self, peer: PeerId, rows: int, elapsed_s: float, now: float) -> None:
        """A good reply took `elapsed_s`, and came at `now`."""
        link = self.link(peer)
        weight = 1 - (1 - WEIGHT) * link.remembered(now)
        link.row_s = link.row_s_at(now)
        link.suspect_until, link.measured_at = 0.0, now
        if rows <= SMALL_ROWS:
            link.base_s += weight * (elapsed_s - link.base_s)
        else:
            per_row = max(0.0, elapsed_s - link.base_s) / rows
            link.row_s += weight * (per_row - link.row_s)

    def suspect(self, peer: PeerId, now: float) -> None:
        """`peer` failed or was late: it is the last choice for `limits.suspect_s`."""
        self.link(peer).suspect_until = now + limits.suspect_s

    def suspected(self, peer: PeerId, now: float) -> bool:
        """Whether `peer` is the last choice at `now`."""
        return self.link(peer).suspect_until > now

    def may_hedge(self) -> bool:
        """Takes one hedge from the budget if there is one: hedges must not become the load."""
        if self._hedges < 1:
            return False
        self._hedges -= 1
        return True


def choose(
    needs: Iterable[W],
    holders: Callable[[W], Sequence[PeerId]],
    links: Links,
    now: float,
) -> tuple[Mapping[PeerId, list[W]], list[W]]:
    """Shares `needs` out over `holders(need)`; the second list is of needs without a holder.

    Largest need first, each to the peer that would be done first with what it already has.
    """
    chosen: dict[PeerId, list[W]] = {}
    rows: dict[PeerId, int] = {}
    unserved: list[W] = []
    for need in sorted(needs, key=lambda need: (-len(need.rows), need.expert, need.rows[:1])):
        peers = holders(need)
        if not peers:
            unserved.append(need)
            continue

        def cost(peer: PeerId, more: int = len(need.rows)) -> tuple[bool, float, PeerId]:
            extra = 0.0 if peer in rows else MESSAGE_S
            done_s = links.chosen_s(peer, rows.get(peer, 0) + more, now) + extra
            return (links.suspected(peer, now), done_s, peer)

        peer = min(peers, key=cost)
        chosen.setdefault(peer, []).append(need)
        rows[peer] = rows.get(peer, 0) + len(need.rows)
    return chosen, unserved
