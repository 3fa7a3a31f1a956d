"""Where experts should be held: a pure plan of a view, the same on every node.

Every gpu node that takes experts by itself computes the same assignment from the same view and
carries out its own part, so no two nodes need to talk about who takes what. Views differ a little
while adverts travel; the plan heals that in the next round.

* Rarest first: experts with the fewest holders are assigned before any gets one more, up to the
  target `replicas`. Each goes to the node with room that ranks first for it by a hash of (peer,
  block), weighted by the node's memory. The ranking does not change while experts are being
  loaded, so nodes whose views differ for a moment still agree about nearly everything.
* If an expert that nobody holds fits nowhere, one node that can makes room by dropping an expert
  of which there are at least two.
* Above the target, one holder lets go: the one that ranks last.
* `Steady` makes changes slow: a plan is carried out only after it has stayed the same for a while,
  except that an expert without any holder is taken at once.
"""

import hashlib
import heapq
import math
from dataclasses import dataclass

from protocols import limits
from protocols.ids import BlockId, PeerId


@dataclass(frozen=True, slots=True)
class Part:
    """An expert that should be held somewhere, and the bytes of memory that holding it takes."""

    block: BlockId
    size: int


@dataclass(frozen=True, slots=True)
class Member:
    """A node as the plan sees it. `auto`: it takes experts by itself."""

    peer: PeerId
    free: int
    auto: bool
    held: frozenset[BlockId]


@dataclass(frozen=True, slots=True)
class View:
    """What a plan is made of; `members` includes `me`, `fixed` is what I hold by order."""

    me: PeerId
    parts: tuple[Part, ...]
    members: tuple[Member, ...]
    replicas: int
    fixed: frozenset[BlockId] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """What this node is to do. `urgent` are those of `hold` that nobody holds."""

    hold: tuple[BlockId, ...] = ()
    drop: tuple[BlockId, ...] = ()
    urgent: frozenset[BlockId] = frozenset()


def rank(peer: PeerId, block: BlockId, capacity: int) -> float:
    """The place of `peer` for `block`, smallest first; each wins in proportion to its capacity.

    Weighted rendezvous hashing: an exponential variable whose rate is the capacity.
    """
    digest = hashlib.sha256(peer.encode() + b"\0" + block).digest()
    return -math.log((int.from_bytes(digest[:7]) + 1) / 2**56) / max(1, capacity)


@dataclass(frozen=True, slots=True)
class _Room:
    """Where room is made for an expert without holder: `peer` is to drop `block`."""

    peer: PeerId
    block: BlockId


class _Ranking:
    """The ranking of the members of one view."""

    def __init__(self, view: View) -> None:
        sizes = {part.block: part.size for part in view.parts}
        self._capacity = {
            member.peer: member.free + sum(sizes.get(block, 0) for block in member.held)
            for member in view.members
        }

    def __call__(self, peer: PeerId, block: BlockId) -> tuple[float, PeerId]:
        return rank(peer, block, self._capacity[peer]), peer


def plan(view: View) -> Plan:
    """What `view.me` should hold and drop, rarest first."""
    counts = {part.block: 0 for part in view.parts}
    for member in view.members:
        for block in member.held:
            if block in counts:
                counts[block] += 1
    order = _Ranking(view)
    taken, room = _assign(view, counts, order)
    mine = tuple(block for block, peer in taken if peer == view.me)
    urgent = frozenset(block for block in mine if counts[block] == 0)
    drop = _surplus(view, counts, order)
    if not drop and room is not None and room.peer == view.me and room.block not in view.fixed:
        drop = (room.block,)
    return Plan(mine, drop, urgent)


def _assign(
    view: View, counts: dict[BlockId, int], order: _Ranking
) -> tuple[list[tuple[BlockId, PeerId]], _Room | None]:
    """Who takes what, in order, and where room is made for a part without holder.

    The node that makes room takes nothing more in this plan: it would fill what it is to free.
    """
    sizes = {part.block: part.size for part in view.parts}
    free = {member.peer: member.free for member in view.members if member.auto}
    held = {member.peer: set(member.held) for member in view.members}
    queue = [(count, block) for block, count in counts.items() if count < view.replicas]
    heapq.heapify(queue)
    taken: list[tuple[BlockId, PeerId]] = []
    room: _Room | None = None
    while queue:
        count, block = heapq.heappop(queue)
        size = sizes[block]
        fits = [peer for peer in free if free[peer] >= size and block not in held[peer]]
        if not fits:
            if count == 0 and room is None:
                room = _room(view, counts, size, free, order)
                if room is not None:
                    del free[room.peer]
            continue
        peer = min(order(peer, block) for peer in fits)[1]
        free[peer] -= size
        held[peer].add(block)
        taken.append((block, peer))
        if count + 1 < view.replicas:
            heapq.heappush(queue, (count + 1, block))
    return taken, room


def _surplus(view: View, counts: dict[BlockId, int], order: _Ranking) -> tuple[BlockId, ...]:
    """At most one block of mine that is held too often, if I am the one to let go."""
    for block in sorted(counts, key=lambda block: (-counts[block], block)):
        if counts[block] <= view.replicas:
            return ()
        holders = [member for member in view.members if member.auto and block in member.held]
        if not holders:
            continue
        loser = max(order(member.peer, block) for member in holders)[1]
        if loser == view.me and block not in view.fixed:
            return (block,)
    return ()


def _room(
    view: View, counts: dict[BlockId, int], size: int, free: dict[PeerId, int], order: _Ranking
) -> _Room | None:
    """The block to drop, of which others have one as well, so that `size` bytes fit."""
    sizes = {part.block: part.size for part in view.parts}
    offers = [
        (-counts[block], order(member.peer, block), member.peer, block)
        for member in view.members
        if member.peer in free
        for block in member.held
        if counts.get(block, 0) > 1 and free[member.peer] + sizes[block] >= size
    ]
    return _Room(*min(offers)[2:]) if offers else None


class Steady:
    """Lets a planned change through once it has been planned for long enough without a break."""

    def __init__(self) -> None:
        self._since: dict[tuple[str, BlockId], float] = {}

    def step(self, planned: Plan, now: float) -> Plan:
        """The part of `planned` to carry out at `now` (seconds of any steady clock)."""
        wanted = {("hold", block) for block in planned.hold}
        wanted |= {("drop", block) for block in planned.drop}
        self._since = {key: self._since.get(key, now) for key in wanted}
        return Plan(
            tuple(
                block
                for block in planned.hold
                if block in planned.urgent
                or self._lasted("hold", block, now, limits.placement_deficit_s)
            ),
            tuple(
                block
                for block in planned.drop
                if self._lasted("drop", block, now, limits.placement_surplus_s)
            ),
            planned.urgent,
        )

    def _lasted(self, verb: str, block: BlockId, now: float, delay_s: float) -> bool:
        return now - self._since[verb, block] >= delay_s
