"""The state machine that gets one layer's rows computed somewhere.

It is told the needs of the layer and who holds what, and says which message goes to which peer. It
is then told what became of each message, and of the passing of time, until nothing is open:

    OPEN --answered--> DONE           its needs are served (those that were not yet)
    OPEN --busy------> DONE           others are asked; if all are busy, again after a pause
    OPEN --not held--> DONE           others are asked for those blocks
    OPEN --failed----> DONE           others are asked; this peer not again in this layer
    OPEN --late------> LATE           another holder is asked as well; the first reply counts
    LATE --anything--> DONE

A need that nobody is left to serve is handed back (`Unserved`): the shell computes it itself or
fails by name. A message to a peer carries all of the layer's rows and experts that go there, unless
it would be too large. Every retry sends the same rows, so nothing about the result depends on what
happened on the way.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from protocols import limits
from protocols.errors import LocalProtocolError
from protocols.experts.routing import Links, choose
from protocols.forward.grouping import Need, split
from protocols.forward.messages import FLOAT_BYTES
from protocols.ids import BlockId, PeerId
from protocols.ready import Ready

Why = Literal["no holder", "busy"]


@dataclass(frozen=True, slots=True)
class Send:
    """Ask `peer` for `needs`. `again` is whether some of these rows have been asked for before."""

    ticket: int
    peer: PeerId
    needs: tuple[Need, ...]
    again: bool

    @property
    def rows(self) -> int:
        """Rows of the answer."""
        return sum(len(need.rows) for need in self.needs)


@dataclass(frozen=True, slots=True)
class Unserved:
    """Nobody is left to compute `need`."""

    need: Need
    why: Why


Step = Ready[None, Send, Unserved]


@dataclass(slots=True)
class _Open:
    send: Send
    at: float
    late_at: float | None  # None once it is late


class Dispatch:
    """One layer's dispatch. `holders(block)` is asked anew at each choice: it may change."""

    def __init__(
        self,
        needs: Sequence[Need],
        *,
        hidden: int,
        holders: Callable[[BlockId], Sequence[PeerId]],
        links: Links,
    ) -> None:
        self._rows_max = max(1, limits.activation_bytes_max // (hidden * FLOAT_BYTES))
        piece = min(self._rows_max, limits.activation_rows_max)
        self._wanted = [part for need in needs for part in split(need, piece)]
        self._unsettled = set(self._wanted)
        self._holders = holders
        self._links = links
        self._open: dict[int, _Open] = {}
        self._failed: set[tuple[PeerId, BlockId]] = set()
        self._down: set[PeerId] = set()
        self._busy_until: dict[PeerId, float] = {}
        self._waiting: list[Need] = []
        self._resume_at: float | None = None
        self._busy_since: float | None = None
        self._pause_s = limits.busy_backoff_s
        self._tickets = 0

    @property
    def done(self) -> bool:
        """Whether every need has been served or handed back."""
        return not self._unsettled

    def start(self, now: float) -> Step:
        """The first messages."""
        return self._place(self._wanted, now, again=False)

    def answered(self, ticket: int, now: float) -> tuple[Need, ...]:
        """A good reply: the needs that it serves; those that another reply has served are left out.

        A reply counts once: an unknown ticket is our bug.
        """
        entry = self._close(ticket)
        self._links.measured(entry.send.peer, entry.send.rows, now - entry.at, now)
        served = tuple(need for need in entry.send.needs if need in self._unsettled)
        self._unsettled.difference_update(served)
        self._waiting = [need for need in self._waiting if need in self._unsettled]
        self._busy_since, self._pause_s = None, limits.busy_backoff_s
        return served

    def busy(self, ticket: int, now: float) -> Step:
        """The peer's queue is full."""
        entry = self._close(ticket)
        self._busy_until[entry.send.peer] = now + self._pause_s
        if self._busy_since is None:
            self._busy_since = now
        return self._retry(entry.send.needs, now)

    def not_held(self, ticket: int, blocks: Iterable[BlockId], now: float) -> Step:
        """The peer does not hold `blocks`, which is at least one of those that it was asked for."""
        entry = self._close(ticket)
        self._failed.update((entry.send.peer, block) for block in blocks)
        return self._retry(entry.send.needs, now)

    def failed(self, ticket: int, now: float) -> Step:
        """The peer is gone, broke a rule, or could not compute: it is not asked again."""
        entry = self._close(ticket)
        self._down.add(entry.send.peer)
        self._links.suspect(entry.send.peer, now)
        return self._retry(entry.send.needs, now)

    def tick(self, now: float) -> Step:
        """Time has passed: hedges what is late, asks the busy again."""
        late: list[Need] = []
        for entry in self._open.values():
            if entry.late_at is not None and entry.late_at <= now:
                late.extend(self._hedge(entry, now))
        resumed: list[Need] = []
        if self._resume_at is not None and self._resume_at <= now:
            resumed, self._waiting, self._resume_at = self._waiting, [], None
        return self._place(late + resumed, now, again=True)

    def reopen(self, need: Need, now: float) -> Step:
        """A need that was handed back is to be tried again: its holders have changed."""
        self._unsettled.add(need)
        self._down.clear()
        self._failed = {(peer, block) for peer, block in self._failed if block != need.block}
        return self._place([need], now, again=True)

    def close(self) -> None:
        """Nothing is waited for any more; replies that still come are dropped."""
        for ticket in tuple(self._open):
            self._close(ticket)

    def _close(self, ticket: int) -> _Open:
        entry = self._open.pop(ticket, None)
        if entry is None:
            raise LocalProtocolError(f"ticket {ticket} is not open")
        self._links.ended(entry.send.peer, entry.send.rows)
        return entry

    def _hedge(self, entry: _Open, now: float) -> list[Need]:
        """The needs of a late message that another holder can be asked for."""
        self._links.suspect(entry.send.peer, now)
        open_ = [need for need in entry.send.needs if need in self._unsettled]
        needs = [
            need for need in open_ if self._candidates(need, now) and not self._asked(need, entry)
        ]
        if needs and self._links.may_hedge():
            entry.late_at = None
            return needs
        entry.late_at = now + limits.hedge_s_min if open_ else None
        return []

    def _asked(self, need: Need, but: _Open) -> bool:
        """Whether a message other than `but` is open for `need`."""
        return any(need in entry.send.needs for entry in self._open.values() if entry is not but)

    def _retry(self, needs: Iterable[Need], now: float) -> Step:
        """Asks others for those of `needs` that are neither served nor still on the way."""
        open_ = {need for entry in self._open.values() for need in entry.send.needs}
        again = [need for need in needs if need in self._unsettled and need not in open_]
        return self._place(again, now, again=True)

    def _candidates(self, need: Need, now: float) -> list[PeerId]:
        asked = {entry.send.peer for entry in self._open.values() if need in entry.send.needs}
        return [
            peer
            for peer in self._possible(need)
            if peer not in asked and self._busy_until.get(peer, 0.0) <= now
        ]

    def _possible(self, need: Need) -> list[PeerId]:
        return [
            peer
            for peer in self._holders(need.block)
            if peer not in self._down and (peer, need.block) not in self._failed
        ]

    def _place(self, needs: Iterable[Need], now: float, *, again: bool) -> Step:
        chosen, left = choose(needs, lambda need: self._candidates(need, now), self._links, now)
        sends = tuple(
            self._send(peer, message, now, again)
            for peer, peer_needs in sorted(chosen.items())
            for message in self._messages(peer_needs)
        )
        events = tuple(
            event for need in left if (event := self._wait_or_give_up(need, now)) is not None
        )
        if self._waiting and self._resume_at is None:
            self._resume_at = now + self._pause_s
            self._pause_s *= 2
        return Ready(send=sends, events=events, wake_at=self.wake_at)

    def _wait_or_give_up(self, need: Need, now: float) -> Unserved | None:
        busy = bool(self._possible(need))
        if busy:
            if self._busy_since is None:  # another's answer has ended the count
                self._busy_since = now
            if now - self._busy_since < limits.busy_s_max:
                self._waiting.append(need)
                return None
        self._unsettled.discard(need)
        return Unserved(need, "busy" if busy else "no holder")

    def _messages(self, needs: list[Need]) -> Iterable[tuple[Need, ...]]:
        """`needs` in as few messages as the limits on rows allow: nearly always one."""
        message: list[Need] = []
        rows: set[int] = set()
        rows_out = 0
        for need in sorted(needs, key=lambda need: (need.expert, need.rows)):
            wider = rows.union(need.rows)
            too_wide = len(wider) > limits.activation_rows_max
            repeated = any(other.block == need.block for other in message)
            if message and (too_wide or repeated or rows_out + len(need.rows) > self._rows_max):
                yield tuple(message)
                message, rows_out, wider = [], 0, set(need.rows)
            message.append(need)
            rows, rows_out = wider, rows_out + len(need.rows)
        if message:
            yield tuple(message)

    def _send(self, peer: PeerId, needs: tuple[Need, ...], now: float, again: bool) -> Send:
        self._tickets += 1
        send = Send(self._tickets, peer, needs, again)
        late_at = now + self._links.late_after_s(peer, send.rows)
        self._links.sent(peer, send.rows)
        self._open[send.ticket] = _Open(send, now, late_at)
        return send

    @property
    def wake_at(self) -> float | None:
        """When `tick` is due."""
        times = [entry.late_at for entry in self._open.values() if entry.late_at is not None]
        if self._resume_at is not None:
            times.append(self._resume_at)
        return min(times, default=None)
