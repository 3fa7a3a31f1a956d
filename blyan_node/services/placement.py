"""What this node holds by itself: the loop that carries out the swarm's plan or an operator's list.

With `auto` the pure plan of `protocols.experts.placement` says, from the adverts of everybody, what
this node is to take and to let go; every node computes the same, so the network returns to its
replica target by itself after a loss. What was held before a restart, and is still wanted, is
loaded first, since it is stored here. A block that an update has replaced is kept for as long as
sessions still ask for it, and a while longer.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, Protocol

import trio

from blyan_node.services.directory import Adverts
from blyan_node.services.held import NoRoom, Reason
from blyan_node.services.holding import Holding
from blyan_node.services.supply import Progress, Supply, silent
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.experts.placement import Member, Part, Steady, View, plan
from protocols.ids import BlockId, PeerId, Subject, cid_text, expert_subject, parse_subject
from storage.pins import Pin
from storage.store import Store

log = logging.getLogger(__name__)


class Placed(Protocol):
    """What placement needs of the chain."""

    def models(self) -> Iterable[BlockId]:
        """The accepted models."""

    def heads(self, model: BlockId) -> Mapping[Subject, BlockId]:
        """The current head of each subject."""


@dataclass(frozen=True)
class PlacementConfig:
    """What this node takes by itself. `subjects` are those of a `list`, of every model."""

    mode: Literal["auto", "none", "list"]
    replicas: int
    subjects: frozenset[Subject] = frozenset()
    may_take: Callable[[BlockId], bool] = lambda model: True


class Placement:
    """Holds and drops experts as the plan, the list or the operator says."""

    def __init__(
        self,
        config: PlacementConfig,
        chain: Placed,
        store: Store,
        supply: Supply,
        adverts: Adverts,
        holding: Holding,
        me: PeerId,
    ) -> None:
        self._config = config
        self._chain = chain
        self._store = store
        self._supply = supply
        self._adverts = adverts
        self._holding = holding
        self._me = me
        self._steady = Steady()
        self._not_before: dict[BlockId, float] = {}
        self._superseded: dict[BlockId, tuple[float, int]] = {}  # last used when, calls by then
        self._before: set[BlockId] = set()  # held by an earlier run

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Plans and acts until cancelled."""
        self._before = {block for block, pin in self._store.pins.every() if pin is Pin.HELD}
        task_status.started()
        while True:
            if not await self.round():
                await trio.sleep(limits.placement_round_s)

    async def round(self) -> bool:
        """Plans once and acts; whether there may be more to do at once."""
        acted = await self._hold(self._ordered(), Reason.ORDER)
        if self._config.mode == "auto":
            acted |= await self._carry_out(self._wanted())
        await self._let_superseded_go()
        return acted

    async def configure(self, config: PlacementConfig) -> None:
        """Goes by `config` from the next round on; lets go what only the one before asked for."""
        before, self._config = self._config, config
        no_more = before.subjects - config.subjects
        for held in self._holding.held():
            by_plan = held.reason is Reason.PLACEMENT and config.mode != "auto"
            subject = expert_subject(held.what.layer, held.what.expert)
            listed = held.reason is Reason.ORDER and subject in no_more
            if by_plan or listed:
                with suppress(KeyError):  # it went by itself, while another was let go
                    await self._holding.drop(held.what.block)

    def replicas(self, model: BlockId) -> int:
        """The holders of the expert of `model` that has the fewest; 0 if it has no experts."""
        counts = [len(self._adverts.holders_with_self(block)) for block in self._experts(model)]
        return min(counts, default=0)

    async def wait_replicas(self, model: BlockId, target: int, progress: Progress = silent) -> int:
        """Waits until every expert of `model` has `target` holders; how many there are."""
        while True:
            seen = self._adverts.changes.count
            blocks = list(self._experts(model))
            counts = [len(self._adverts.holders_with_self(block)) for block in blocks]
            done = sum(min(count, target) for count in counts)
            progress(done, target * len(blocks), "replicas")
            if blocks and min(counts) >= target:
                return min(counts)
            with trio.move_on_after(limits.placement_refresh_s):
                await self._adverts.changes.wait(seen)

    async def hold(self, blocks: Sequence[BlockId], progress: Progress = silent) -> None:
        """Holds experts by the operator's order. Raises `Refused`."""
        await self._supply.ensure(blocks, progress)
        for done, block in enumerate(blocks):
            try:
                await self._holding.keep(block, Reason.ORDER)
            except NoRoom as error:
                raise error.refused() from error
            self._not_before.pop(block, None)
            progress(done + 1, len(blocks), "experts")

    async def drop(self, blocks: Sequence[BlockId], *, force: bool = False) -> None:
        """Lets experts go; this node does not take them back by itself for a while.

        Raises `Refused` LAST_COPY for one that nobody else holds, unless `force`.
        """
        for block in blocks:
            if not self._holding.keeps(block):
                raise Refused(
                    ErrorCode.NOT_FOUND,
                    "this expert is not held here",
                    "there is nothing to drop",
                    "`blyan-node expert list` shows who holds what.",
                    self._about(block),
                )
            if not force and set(self._adverts.holders_with_self(block)) <= {self._me}:
                raise Refused(
                    ErrorCode.LAST_COPY,
                    "nobody else holds this expert",
                    "requests that need it would have to load it themselves, or fail",
                    "Let another node hold it first, or give --force.",
                    self._about(block),
                )
        for block in blocks:
            self._not_before[block] = trio.current_time() + limits.placement_dropped_s
            if self._holding.keeps(block):  # the plan may have dropped it since
                await self._holding.drop(block)

    def _about(self, block: BlockId) -> dict[str, object]:
        """What an error about `block` names."""
        known = self._store.block(block)
        subject = None if known is None else known.header.subject
        return {"expert": str(subject), "block": cid_text(block)}

    def _experts(self, model: BlockId) -> Iterator[BlockId]:
        for subject, block in self._chain.heads(model).items():
            if parse_subject(subject).expert is not None:
                yield block

    def _wanted(self) -> dict[BlockId, Part]:
        """Every expert at its head that this node may take."""
        return {
            block: Part(block, self._holding.size_of(block))
            for model in self._chain.models()
            if self._config.may_take(model)
            for block in self._experts(model)
        }

    def _ordered(self) -> list[BlockId]:
        """The heads that are not held yet of what is listed or was ordered at an earlier head."""
        ordered = {
            (h.what.model, expert_subject(h.what.layer, h.what.expert))
            for h in self._holding.held()
            if h.reason is Reason.ORDER
        }
        return [
            block
            for model in self._chain.models()
            for subject, block in self._chain.heads(model).items()
            if subject in self._config.subjects or (model, subject) in ordered
            if not self._holding.keeps(block)
        ]

    async def _carry_out(self, wanted: Mapping[BlockId, Part]) -> bool:
        view = self._view(wanted)
        again = self._known_before(view)
        if again:
            return await self._hold(again, Reason.PLACEMENT)
        step = self._steady.step(plan(view), trio.current_time())
        for block in step.drop:
            if self._holding.keeps(block):
                log.info("dropping %s: others hold it", cid_text(block))
                await self._holding.drop(block)
        return await self._hold(step.hold, Reason.PLACEMENT)

    def _view(self, wanted: Mapping[BlockId, Part]) -> View:
        members = [
            Member(
                peer,
                advert.memory_free,
                advert.auto,
                frozenset(held.block for held in advert.held()),
            )
            for peer, advert in self._adverts.directory.adverts().items()
            if peer != self._me and advert.profile == self._adverts.config.profile
        ]
        mine = frozenset(held.block for held in self._holding.advertised())
        members.append(Member(self._me, self._holding.memory_free, True, mine))
        by_order = (h.what.block for h in self._holding.held() if h.reason is Reason.ORDER)
        return View(
            self._me,
            tuple(wanted.values()),
            tuple(sorted(members, key=lambda member: member.peer)),
            self._config.replicas,
            frozenset(by_order),
        )

    def _known_before(self, view: View) -> list[BlockId]:
        """What an earlier run held and is still short of its target; each is tried once."""
        wanted = {part.block for part in view.parts}
        found = []
        for block in sorted(self._before & wanted):
            holders = sum(block in member.held for member in view.members)
            self._before.discard(block)
            if holders < view.replicas and not self._holding.keeps(block):
                found.append(block)
        self._before.update(found[limits.placement_batch_blocks_max :])
        return found[: limits.placement_batch_blocks_max]

    async def _hold(self, blocks: Sequence[BlockId], reason: Reason) -> bool:
        """Loads the first few of `blocks`; whether one was loaded."""
        now = trio.current_time()
        due = [block for block in blocks if self._not_before.get(block, 0.0) <= now]
        held = False
        for block in due[: limits.placement_batch_blocks_max]:
            try:
                await self._holding.keep(block, reason)
                held = True
            except (Refused, NoRoom) as error:
                log.warning("cannot hold %s: %s", cid_text(block), error)
                self._not_before[block] = trio.current_time() + limits.placement_retry_s
        return held

    async def _let_superseded_go(self) -> None:
        """Drops what no head names any more, once it has not been asked for for a while."""
        now = trio.current_time()
        heads = {block for model in self._chain.models() for block in self._experts(model)}
        mine = {held.block for held in self._holding.advertised()}
        gone = (mine | self._before) - heads
        self._superseded = {block: self._used(block, now) for block in gone}
        for block, (since, _) in list(self._superseded.items()):
            if now - since >= limits.placement_superseded_s:
                del self._superseded[block]
                self._before.discard(block)
                if self._holding.keeps(block):
                    await self._holding.drop(block)
                else:
                    self._store.unpin(block, reason=Pin.HELD)

    def _used(self, block: BlockId, now: float) -> tuple[float, int]:
        """When a superseded block was last seen to be of use, and how often it was by then."""
        held = self._holding.get(block)
        calls = held.calls if held else 0
        since, before = self._superseded.get(block, (now, calls))
        return (since, calls) if calls == before else (now, calls)
