"""What this node holds: experts that are loaded, within the memory that its operator gives.

*Kept* experts (by the operator's order or by placement) are advertised and serve others until they
are dropped. *Passing* ones were loaded because a request here needed an expert that nobody holds;
they are not advertised and leave, the longest unused first, when memory is needed
(`blyan_node.services.memory`); those of placement leave only for what requests of this node need.
What is in use never leaves: a dropped expert stays until its last user is done. With an expert goes
its pack file.

Kept experts are in the node's own precision. A request may ask for another one: what it loads for
itself is beside them, so an expert is named by its block and its precision.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import trio

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.config import ModelConfig
from blyan_node.moe.experts import Expert
from blyan_node.moe.precision import expert_bytes
from blyan_node.services.changes import Changes
from blyan_node.services.compute import in_turn
from blyan_node.services.held import Held, Key, NoRoom, Reason, not_an_expert
from blyan_node.services.memory import Memory, Sort
from blyan_node.services.models import Models
from blyan_node.services.supply import Progress, Supply, silent
from protocols import limits
from protocols.experts.advert import HeldExpert
from protocols.ids import BlockId, expert_subject, parse_subject
from protocols.precision import PUBLISHED, Precision, effective
from storage.gc import pack
from storage.pins import Pin
from storage.store import Store

log = logging.getLogger(__name__)


class Borrower(Protocol):
    """Who uses kept experts for a long time, a moment here and a moment there."""

    def give_back(self) -> None:
        """Ends its use of all, at once or after the moment that this is."""


# What may be let go to load an expert, and as what one is let go itself.
_WORTH = {Reason.ORDER: Sort.IDLE, Reason.PLACEMENT: Sort.PASSING, Reason.PASSING: Sort.PLACED}
_LENT = {Reason.PASSING: Sort.PASSING, Reason.PLACEMENT: Sort.PLACED}


class Holding:
    """The loaded experts of this node. `memory_bytes` bounds all that `memory` counts.

    `precision` is the node's own; where a method takes one, None stands for it.
    """

    def __init__(
        self,
        store: Store,
        supply: Supply,
        models: Models,
        memory_bytes: int,
        arithmetic: Arithmetic,
        precision: Precision = PUBLISHED,
    ) -> None:
        self.arithmetic, self.precision = arithmetic, effective(precision)
        self.changes = Changes()
        self.borrowers: set[Borrower] = set()
        self.version = 0  # of what is kept
        self.memory = Memory(memory_bytes)
        for reason, sort in _LENT.items():
            self.memory.lender(sort, partial(self._let_go, reason))
        self._store = store
        self._supply = supply
        self._models = models
        self._held: dict[Key, Held] = {}  # the longest unused first
        self._leaving: list[Held] = []
        self._gone: dict[Key, Reason] = {}  # let go, and their packs and pins are still there
        self._sizes: dict[Key, int] = {}
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
        held = self.get(block)
        return held is not None and held.reason is not Reason.PASSING

    def get(self, block: BlockId) -> Held | None:
        """The expert of `block`, loaded in the node's own precision."""
        return self._held.get((block, self.precision))

    def size_of(self, block: BlockId, precision: Precision | None = None) -> int:
        """The most bytes that holding an expert's `block` takes. 0 if it is not known."""
        key = (block, precision or self.precision)
        if key not in self._sizes:
            known = self._store.block(block)
            body = known and known.header.body
            manifest = self._store.manifest(body) if body else None
            if manifest is None:
                return 0
            self._sizes[key] = expert_bytes(manifest, key[1])
        return self._sizes[key]

    async def keep(self, block: BlockId, reason: Reason, progress: Progress = silent) -> int:
        """Loads `block` and keeps it; the bytes that were fetched. Raises `Refused`, `NoRoom`."""
        fetched = await self._load((block, self.precision), reason, progress)
        held = self._held[block, self.precision]
        if held.reason is not Reason.ORDER:
            held.reason = reason
        self.version += 1
        await trio.to_thread.run_sync(
            lambda: self._store.pin(block, reason=Pin.HELD), limiter=self._limiter
        )
        self.changes.tell()
        return fetched

    async def drop(self, block: BlockId) -> None:
        """Lets go of `block`; whoever computes with it finishes first. Raises `KeyError`."""
        self._remove(self._held[block, self.precision])
        await self.clear()

    async def load(
        self, block: BlockId, progress: Progress = silent, *, precision: Precision | None = None
    ) -> int:
        """Loads `block` for a request of this node; the bytes that were fetched.

        Raises `Refused` if no peer has it, `NoRoom` if it does not fit.
        """
        return await self._load((block, precision or self.precision), Reason.PASSING, progress)

    @contextmanager
    def use(
        self, blocks: Sequence[BlockId], precision: Precision | None = None
    ) -> Iterator[list[Held] | None]:
        """The loaded experts in the order of `blocks`, safe until the end; None if one is not."""
        keys = [(block, precision or self.precision) for block in blocks]
        if any(key not in self._held for key in keys):
            yield None
            return
        used = [self._held.pop(key) for key in keys]
        for key, held in zip(keys, used, strict=True):
            held.users += 1
            self._held[key] = held
        try:
            yield used
        finally:
            for held in used:
                held.users -= 1
                if held.leaving and not held.users:
                    self._leaving.remove(held)
                    self.memory.experts -= held.bytes
            self._released.tell()

    async def room(self, size: int, upto: Sort) -> bool:
        """Makes room (`Memory.make_room`); whether there is.

        Waits a moment for what is computed with now, if that can be let go then and is enough.
        """
        with trio.move_on_after(limits.room_wait_s_max):
            while not self.memory.make_room(size, upto):
                if self.memory.free + self._free_soon(upto) < size:
                    break
                await self._released.wait()
            else:
                return True
        await self.clear()  # of what was let go in vain
        return False

    async def clear(self) -> None:
        """Takes the pins and deletes the pack files of what has been let go."""
        gone = {key: why for key, why in self._gone.items() if key not in self._held}
        in_place = {block for (block, _), held in self._held.items() if not held.expert.converted}
        self._gone.clear()

        def clear() -> None:
            for (block, _), reason in gone.items():
                if reason is not Reason.PASSING:
                    self._store.unpin(block, reason=Pin.HELD)
                if block not in in_place:
                    self._store.packs.drop(block)

        if gone:
            with trio.CancelScope(shield=True):  # who else would know of them? A few files
                await trio.to_thread.run_sync(clear, limiter=self._limiter)
            self.changes.tell()

    def _free_soon(self, upto: Sort) -> int:
        """The bytes of experts in use that are let go afterwards, or may be."""
        lent = {reason for reason, sort in _LENT.items() if sort <= upto}
        used = sum(h.bytes for h in self._held.values() if h.users and h.reason in lent)
        return used + sum(h.bytes for h in self._leaving)

    def _let_go(self, reason: Reason, size: int) -> None:
        """Lets experts of `reason` that nobody uses go until `size` bytes are free."""
        if reason is not Reason.PASSING:
            self._ask_back()
        for held in list(self._held.values()):
            if self.memory.free >= size:
                break
            if held.reason is reason and not held.users:
                self._remove(held)

    def _ask_back(self) -> None:
        for borrower in tuple(self.borrowers):
            borrower.give_back()

    def _remove(self, held: Held) -> None:
        if held.reason is not Reason.PASSING:
            self._ask_back()
            self.version += 1
        key = (held.what.block, held.precision)
        del self._held[key]
        self._gone[key] = held.reason
        if held.users:
            held.leaving = True
            self._leaving.append(held)
        else:
            self.memory.experts -= held.bytes

    async def _load(self, key: Key, reason: Reason, progress: Progress) -> int:
        if key in self._held:
            return 0
        fetched = await self._supply.ensure([key[0]], progress)
        async with self._loading:
            if key not in self._held:
                await self._load_stored(key, reason)
        return fetched

    async def _load_stored(self, key: Key, reason: Reason) -> None:
        block, precision = key
        what = self._name(block)
        description = await self._models.describe(what.model)
        config = description.config
        if what.layer >= len(config.layers) or what.expert >= config.experts_of(what.layer):
            raise not_an_expert(block)
        size = self.size_of(block, precision)
        if not await self.room(size, _WORTH[reason]):
            raise NoRoom(block, size, self.memory.free)
        self.memory.experts += size
        try:
            expert = await self._read(key, what, config)
        except BaseException:  # whatever it was, nothing is held
            self.memory.experts -= size
            raise
        self.memory.experts -= size - expert.bytes
        self.memory.copies(expert.copied)
        self._held[key] = Held(what, precision, expert, config.hidden, expert.bytes, reason)
        log.info(
            "loaded layer %d expert %d as %s (%s)",
            what.layer, what.expert, expert.storage, reason.value,
        )  # fmt: skip

    async def _read(self, key: Key, what: HeldExpert, config: ModelConfig) -> Expert:
        await self.clear()
        block, precision = key
        others = [held.expert for held in self._held.values() if held.what.block == block]
        in_place = not all(expert.converted for expert in others)

        def read() -> Expert:
            nonlocal in_place
            subject = expert_subject(what.layer, what.expert)
            try:
                tensors = pack(self._store, block).tensors
                expert = Expert(config, subject, tensors, self.arithmetic, precision=precision)
                in_place |= not expert.converted
                return expert
            finally:
                if not in_place:
                    self._store.packs.drop(block)

        return await in_turn(read, self._limiter)

    def _name(self, block: BlockId) -> HeldExpert:
        """Which expert of which model `block` is; raises `Refused` if it is none."""
        known = self._store.block(block)
        if known is not None and known.header.model and known.header.subject:
            subject = parse_subject(known.header.subject)
            if subject.layer is not None and subject.expert is not None:
                return HeldExpert(known.header.model, subject.layer, subject.expert, block)
        raise not_an_expert(block)
