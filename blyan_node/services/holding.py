"""What this node holds: experts that are loaded, within the memory that its operator gives.

*Kept* experts (by the operator's order or by placement) are advertised and serve others until they
are dropped. *Passing* ones were loaded because a request here needed an expert that nobody holds;
they are not advertised and leave, the longest unused first, when memory is needed
(`blyan_node.services.memory`); those of placement leave only for what requests of this node need.
What is in use never leaves: a dropped expert stays until its last user is done. With an expert goes
its pack file.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

import trio

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.experts import Expert
from blyan_node.services.changes import Changes
from blyan_node.services.memory import Memory, Sort
from blyan_node.services.models import Models
from blyan_node.services.supply import Progress, Supply, silent
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.experts.advert import HeldExpert
from protocols.ids import BlockId, cid_text, expert_subject, parse_subject
from storage.gc import pack
from storage.pins import Pin
from storage.store import Store

log = logging.getLogger(__name__)


class Reason(Enum):
    """Why an expert is loaded."""

    ORDER = "order"  # the operator said so
    PLACEMENT = "placement"  # the swarm's plan
    PASSING = "passing"  # a request of this node needed it


# What may be let go to load an expert.
_WORTH = {Reason.ORDER: Sort.IDLE, Reason.PLACEMENT: Sort.PASSING, Reason.PASSING: Sort.PLACED}


@dataclass
class Held:
    """One loaded expert and what it has done since."""

    what: HeldExpert
    expert: Expert
    hidden: int  # values in a row
    bytes: int
    reason: Reason
    users: int = 0
    leaving: bool = False
    calls: int = 0
    rows: int = 0
    busy_s: float = 0.0


@dataclass
class NoRoom(Exception):
    """An expert of `size` bytes does not fit into the memory that is `free`."""

    block: BlockId
    size: int
    free: int

    def refused(self) -> Refused:
        """The same, as an operator is told."""
        return Refused(
            ErrorCode.NOT_ALLOWED,
            "the expert does not fit into this node's memory",
            f"it takes {self.size} bytes, {self.free} are free",
            "Start the node with a larger --memory, or drop other experts.",
            {"block": cid_text(self.block)},
        )


class Holding:
    """The loaded experts of this node, by block. `memory_bytes` bounds all that `memory` counts."""

    def __init__(self, store: Store, supply: Supply, models: Models, memory_bytes: int) -> None:
        self.changes = Changes()
        self.memory = Memory(memory_bytes)
        self.memory.lender(Sort.PASSING, lambda size: self._let_go(size, Reason.PASSING))
        self.memory.lender(Sort.PLACED, lambda size: self._let_go(size, Reason.PLACEMENT))
        self._store = store
        self._supply = supply
        self._models = models
        self._held: dict[BlockId, Held] = {}  # the longest unused first
        self._leaving: list[Held] = []
        self._gone: dict[BlockId, Reason] = {}  # let go, and their packs and pins are still there
        self._sizes: dict[BlockId, int] = {}
        self._loading = trio.Lock()
        self._released = Changes()  # somebody is done with an expert
        self._limiter = trio.CapacityLimiter(1)

    def advertised(self) -> list[HeldExpert]:
        """The experts that are kept for others."""
        return [held.what for held in self._held.values() if held.reason is not Reason.PASSING]

    def held(self) -> Sequence[Held]:
        """Every loaded expert."""
        return tuple(self._held.values())

    @property
    def memory_free(self) -> int:
        """Bytes that kept experts could still take: passing ones make room for them."""
        passing = sum(h.bytes for h in self._held.values() if h.reason is Reason.PASSING)
        return self.memory.free + passing

    def keeps(self, block: BlockId) -> bool:
        """Whether `block` is loaded and kept for others."""
        held = self._held.get(block)
        return held is not None and held.reason is not Reason.PASSING

    def get(self, block: BlockId) -> Held | None:
        """The loaded expert of `block`."""
        return self._held.get(block)

    def size_of(self, block: BlockId) -> int:
        """How many bytes holding `block` takes: those that are stored. 0 if it is not known."""
        if block not in self._sizes:
            known = self._store.block(block)
            body = known and known.header.body
            manifest = self._store.manifest(body) if body else None
            if manifest is None:
                return 0
            self._sizes[block] = manifest.size
        return self._sizes[block]

    async def keep(self, block: BlockId, reason: Reason, progress: Progress = silent) -> int:
        """Loads `block` and keeps it; the bytes that were fetched. Raises `Refused`, `NoRoom`."""
        fetched = await self._load(block, reason, progress)
        held = self._held[block]
        if held.reason is not Reason.ORDER:
            held.reason = reason
        await trio.to_thread.run_sync(
            lambda: self._store.pin(block, reason=Pin.HELD), limiter=self._limiter
        )
        self.changes.tell()
        return fetched

    async def drop(self, block: BlockId) -> None:
        """Lets go of `block`; whoever computes with it finishes first. Raises `KeyError`."""
        self._remove(self._held[block])
        await self.clear()

    async def load(self, block: BlockId, progress: Progress = silent) -> int:
        """Loads `block` for a request of this node; the bytes that were fetched.

        Raises `Refused` if no peer has it, `NoRoom` if it does not fit.
        """
        return await self._load(block, Reason.PASSING, progress)

    @contextmanager
    def use(self, blocks: Sequence[BlockId]) -> Iterator[list[Held] | None]:
        """The loaded experts in the order of `blocks`, safe until the end; None if one is not."""
        if any(block not in self._held for block in blocks):
            yield None
            return
        used = [self._held.pop(block) for block in blocks]
        for held in used:
            held.users += 1
            self._held[held.what.block] = held
        try:
            yield used
        finally:
            for held in used:
                held.users -= 1
                if held.leaving and not held.users:
                    self._leaving.remove(held)
                    self.memory.experts -= held.bytes
            self._released.tell()

    async def clear(self) -> None:
        """Takes the pins and deletes the pack files of what has been let go."""
        gone = {block: why for block, why in self._gone.items() if block not in self._held}
        self._gone.clear()

        def clear() -> None:
            for block, reason in gone.items():
                if reason is not Reason.PASSING:
                    self._store.unpin(block, reason=Pin.HELD)
                self._store.packs.drop(block)

        if gone:
            with trio.CancelScope(shield=True):  # who else would know of them? A few files
                await trio.to_thread.run_sync(clear, limiter=self._limiter)
            self.changes.tell()

    def _let_go(self, size: int, reason: Reason) -> None:
        """Lets experts of `reason` that nobody uses go until `size` bytes are free."""
        for held in list(self._held.values()):
            if self.memory.free >= size:
                break
            if held.reason is reason and not held.users:
                self._remove(held)

    def _remove(self, held: Held) -> None:
        del self._held[held.what.block]
        self._gone[held.what.block] = held.reason
        if held.users:
            held.leaving = True
            self._leaving.append(held)
        else:
            self.memory.experts -= held.bytes

    async def _load(self, block: BlockId, reason: Reason, progress: Progress) -> int:
        if block in self._held:
            return 0
        fetched = await self._supply.ensure([block], progress)
        async with self._loading:
            if block not in self._held:
                await self._load_stored(block, reason)
        return fetched

    async def _load_stored(self, block: BlockId, reason: Reason) -> None:
        what = self._name(block)
        description = await self._models.describe(what.model)
        config = description.config
        if what.layer >= len(config.layers) or what.expert >= config.experts_of(what.layer):
            raise _not_an_expert(block)
        size = self.size_of(block)
        if not await self._room(size, reason):
            raise NoRoom(block, size, self.memory.free)
        self.memory.experts += size
        try:
            expert = await self._read(block, what, config)
        except BaseException:  # whatever it was, nothing is held
            self.memory.experts -= size
            raise
        self.memory.copied += expert.copied
        self._held[block] = Held(what, expert, config.hidden, size, reason)
        log.info("loaded layer %d expert %d (%s)", what.layer, what.expert, reason.value)

    async def _room(self, size: int, reason: Reason) -> bool:
        """Makes room; waits a moment for what is computed with now, if that can be let go then."""
        with trio.move_on_after(limits.room_wait_s_max):
            while not self.memory.make_room(size, _WORTH[reason]):
                used = sum(h.bytes for h in self._held.values() if h.users)
                used += sum(h.bytes for h in self._leaving)
                if reason is not Reason.PASSING or self.memory.free + used < size:
                    return False
                await self._released.wait()
            return True
        return False

    async def _read(self, block: BlockId, what: HeldExpert, config: ModelConfig) -> Expert:
        await self.clear()

        def read() -> Expert:
            subject = expert_subject(what.layer, what.expert)
            return Expert(config, subject, pack(self._store, block).tensors)

        return await trio.to_thread.run_sync(read, limiter=self._limiter)

    def _name(self, block: BlockId) -> HeldExpert:
        """Which expert of which model `block` is; raises `Refused` if it is none."""
        known = self._store.block(block)
        if known is not None and known.header.model and known.header.subject:
            subject = parse_subject(known.header.subject)
            if subject.layer is not None and subject.expert is not None:
                return HeldExpert(known.header.model, subject.layer, subject.expert, block)
        raise _not_an_expert(block)


def _not_an_expert(block: BlockId) -> Refused:
    return Refused(
        ErrorCode.NOT_FOUND,
        "this block cannot be held",
        "it is not an expert of a model that this node knows",
        "`blyan-node expert list` shows the experts.",
        {"block": cid_text(block)},
    )
