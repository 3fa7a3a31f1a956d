"""Who is asked for what: a plan that fetches named items from several peers at once.

The plan has what is wanted, the peers that may have it, and what is under way. `next(now)` says
whom to ask for which items; the shell reports what became of each request. Every peer is asked for
different items, in the order in which they were wanted, so two peers share the work and a slow one
takes less of it. What a peer does not have is asked of others. A peer that fails rests for a while,
and after `fetch_failures_max` failures in a row, or one corrupt item, it is asked no more. Near the
end, items that one peer is slow with are asked of an idle one as well.

Items may be wanted in groups (the chunks of one block): a peer that has none of those that it was
asked for is taken to have nothing of the group, so who holds little costs few questions.

Nothing here fetches twice on purpose except that; what is here already is simply not wanted, which
is what makes a fetch resumable.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from protocols import limits
from protocols.errors import LocalProtocolError
from protocols.ids import ChunkHash, PeerId

K = TypeVar("K", bound=bytes)


@dataclass(frozen=True, slots=True)
class PlanLimits:
    """How much is asked at once: items in one request, items under way at one peer."""

    batch: int = limits.chunks_per_request_max // 2
    in_flight: int = limits.chunks_in_flight_per_peer_max
    failures: int = limits.fetch_failures_max
    backoff_s: float = limits.fetch_backoff_s
    slow_s: float = limits.fetch_slow_s


@dataclass(frozen=True, slots=True)
class Assignment(Generic[K]):
    """One request: `keys` are to be asked of `peer`. `id` counts up within a plan."""

    id: int
    peer: PeerId
    keys: tuple[K, ...]


@dataclass(slots=True)
class _Peer(Generic[K]):
    preferred: bool
    under_way: dict[int, Assignment[K]] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    absent: set[K] = field(default_factory=set)
    absent_groups: set[bytes] = field(default_factory=set)
    failures: int = 0
    rests_until: float = 0.0
    dry_since: int = -1  # the plan's version when it had nothing for this peer
    bytes: int = 0

    @property
    def load(self) -> int:
        return sum(len(a.keys) for a in self.under_way.values())


class FetchPlan(Generic[K]):
    """Items (key, size in bytes) that are to be fetched; sizes are for progress alone."""

    def __init__(
        self, wanted: Iterable[tuple[K, int]] = (), bounds: PlanLimits = PlanLimits()
    ) -> None:
        self._bounds = bounds
        self._sizes: dict[K, int] = {}
        self._group: dict[K, bytes] = {}
        self._pending: dict[bytes, dict[K, None]] = {}  # wanted and asked of nobody, by group
        self._copies: dict[K, int] = {}  # how many requests are under way for an item
        self._peers: dict[PeerId, _Peer[K]] = {}
        self._dismissed: set[PeerId] = set()
        self._gone_bytes: dict[PeerId, int] = {}
        self._assignments = 0
        self._version = 0
        self.bytes_done = 0
        self.bytes_total = 0
        self.want(wanted)

    @property
    def done(self) -> bool:
        """Whether nothing is wanted any more."""
        return not self._sizes

    @property
    def peers(self) -> list[PeerId]:
        """Who may be asked."""
        return list(self._peers)

    @property
    def bytes_by_peer(self) -> dict[PeerId, int]:
        """Bytes of verified items that each peer has brought, those who left included."""
        now = {peer: state.bytes for peer, state in self._peers.items()}
        return {
            peer: count
            for peer in {**self._gone_bytes, **now}
            if (count := self._gone_bytes.get(peer, 0) + now.get(peer, 0))
        }

    def want(self, items: Iterable[tuple[K, int]], group: bytes | None = None) -> None:
        """Adds items behind those that are wanted already; repeats count once.

        Without a `group`, each item is one of its own.
        """
        for key, size in items:
            if key not in self._sizes:
                self._sizes[key] = size
                self._group[key] = of = bytes(key) if group is None else group
                self._pending.setdefault(of, {})[key] = None
                self.bytes_total += size
        self._version += 1

    def add_peer(self, peer: PeerId, *, preferred: bool = False) -> None:
        """A peer that may have any of the items; a preferred one is asked first.

        One that failed or lied before is not taken back.
        """
        if peer in self._dismissed:
            return
        if peer not in self._peers:
            self._peers[peer] = _Peer(preferred)
        elif preferred:
            self._peers[peer].preferred = True

    def drop_peer(self, peer: PeerId) -> None:
        """A peer is asked no more; what it was asked for is asked of others."""
        state = self._peers.pop(peer, None)
        if state is None:
            return
        self._gone_bytes[peer] = self._gone_bytes.get(peer, 0) + state.bytes
        for assignment in state.under_way.values():
            self._requeue(assignment)

    def next(self, now: float) -> list[Assignment[K]]:
        """What to ask now: different items of every peer that has room, the least busy first."""
        made: list[Assignment[K]] = []
        while True:
            ready = [peer for peer in self._peers if self._may_ask(peer, now)]
            ready.sort(key=lambda p: (self._peers[p].load, not self._peers[p].preferred))
            assignment = next((a for p in ready if (a := self._assign(p, now))), None)
            if assignment is None:
                return made
            made.append(assignment)

    def arrived(self, assignment: Assignment[K], keys: Iterable[K]) -> list[K]:
        """Verified items came from the assignment's peer; those that were still wanted."""
        fresh = [key for key in keys if key in self._sizes]
        count = sum(self._sizes[key] for key in fresh)
        if state := self._peers.get(assignment.peer):
            state.bytes += count
        else:
            self._gone_bytes[assignment.peer] = self._gone_bytes.get(assignment.peer, 0) + count
        for key in fresh:
            self._take(key)
            del self._sizes[key]
            self._copies.pop(key, None)
        self.bytes_done += count
        return fresh

    def answered(self, assignment: Assignment[K], absent: Iterable[K] = ()) -> None:
        """The request came to its end; `absent` is what the peer does not have.

        What is neither absent nor arrived did not fit into the reply and is asked again.
        """
        state = self._end(assignment)
        if state is None:
            return
        state.failures = 0
        state.dry_since = -1
        lacks = set(absent)
        had = {self._group[key] for key in assignment.keys if key not in lacks}
        state.absent |= lacks
        state.absent_groups |= {self._group[key] for key in assignment.keys} - had

    def failed(self, assignment: Assignment[K], now: float) -> None:
        """The request had no good end: no answer in time, or the peer refused."""
        state = self._end(assignment)
        if state is None:
            return
        state.failures += 1
        state.rests_until = now + self._bounds.backoff_s * 2 ** (state.failures - 1)
        if state.failures >= self._bounds.failures:
            self._dismiss(assignment.peer)

    def corrupt(self, assignment: Assignment[K]) -> None:
        """The peer sent something that is not what was asked for: it is asked no more."""
        self._dismiss(assignment.peer)

    def stuck(self) -> list[K]:
        """If nothing is under way and nobody is left to ask: what cannot be had now."""
        if any(state.under_way for state in self._peers.values()):
            return []
        if any(next(self._askable(state), None) for state in self._peers.values()):
            return []
        return [key for keys in self._pending.values() for key in keys]

    def wake_at(self, now: float) -> float | None:
        """When time alone gives `next` more to ask than it found at `now`; None if never.

        That is when a resting peer may be asked again, or a slow request is asked of another.
        """
        rests = [s.rests_until for s in self._peers.values() if not s.under_way]
        slow = [t + self._bounds.slow_s for s in self._peers.values() for t in s.began.values()]
        return min((at for at in (*rests, *slow) if at > now), default=None)

    def _dismiss(self, peer: PeerId) -> None:
        self._dismissed.add(peer)
        self.drop_peer(peer)

    def _may_ask(self, peer: PeerId, now: float) -> bool:
        state = self._peers[peer]
        return now >= state.rests_until and state.load < self._bounds.in_flight

    def _assign(self, peer: PeerId, now: float) -> Assignment[K] | None:
        state = self._peers[peer]
        room = min(self._bounds.batch, self._bounds.in_flight - state.load)
        keys: list[K] = []
        if state.dry_since != self._version:
            keys = list(islice(self._askable(state), room))
            if not keys:
                state.dry_since = self._version
        if not keys and not state.under_way:
            keys = self._slow_items(peer, now)[:room]
        if not keys:
            return None
        for key in keys:
            self._take(key)
            self._copies[key] = self._copies.get(key, 0) + 1
        self._assignments += 1
        assignment = Assignment(self._assignments, peer, tuple(keys))
        state.under_way[assignment.id] = assignment
        state.began[assignment.id] = now
        return assignment

    def _askable(self, state: _Peer[K]) -> Iterator[K]:
        """What is asked of nobody, and the peer may have."""
        for group, keys in self._pending.items():
            if group not in state.absent_groups:
                yield from (key for key in keys if key not in state.absent)

    def _take(self, key: K) -> None:
        """The item is not pending any more."""
        group = self._group[key]
        if (keys := self._pending.get(group)) is not None:
            keys.pop(key, None)
            if not keys:
                del self._pending[group]

    def _slow_items(self, idle: PeerId, now: float) -> list[K]:
        """Items that another peer was asked for long ago, once."""
        absent = self._peers[idle].absent
        return [
            key
            for peer, state in self._peers.items()
            if peer != idle
            for id, assignment in state.under_way.items()
            if now - state.began[id] >= self._bounds.slow_s
            for key in assignment.keys
            if key in self._sizes and self._copies.get(key) == 1 and key not in absent
        ]

    def _end(self, assignment: Assignment[K]) -> _Peer[K] | None:
        """Closes a request; None if its peer was dropped (then it was closed with it)."""
        state = self._peers.get(assignment.peer)
        if state is None or assignment.id not in state.under_way:
            return None
        del state.under_way[assignment.id], state.began[assignment.id]
        self._requeue(assignment)
        return state

    def _requeue(self, assignment: Assignment[K]) -> None:
        for key in assignment.keys:
            if key not in self._sizes:
                continue
            self._copies[key] -= 1
            if self._copies[key] < 0:
                raise LocalProtocolError("a request was closed twice")
            if not self._copies[key]:
                self._pending.setdefault(self._group[key], {})[key] = None
                self._version += 1


class ChunkPlan(FetchPlan[ChunkHash]):
    """The plan for chunks: four in a request, eight under way at one peer."""
