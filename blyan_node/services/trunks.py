"""Trunks that are loaded: everything of a model but its experts, shared by its sessions.

A trunk is named by the blocks that it is made of, so that two roots that differ in an expert only
share one, and by the precision in which it is held. It stays while a session uses it, and a few
stay afterwards, for as long as nothing else needs the memory. With a trunk go its pack files; those
of converted parts go as soon as it is loaded.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from blyan_node.moe.families import layout
from blyan_node.moe.layout import SubjectLayout
from blyan_node.moe.precision import part_bytes
from blyan_node.moe.strict_json import refuse
from blyan_node.moe.trunk import Trunk
from blyan_node.services.compute import in_turn
from blyan_node.services.holding import Holding
from blyan_node.services.memory import Sort
from blyan_node.services.models import Description
from blyan_node.services.supply import Progress, Supply
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text, parse_subject
from protocols.precision import Precision
from storage.gc import pack
from storage.store import Store

idle_trunks_max = 2

Parts = Mapping[Subject, BlockId]


@dataclass(frozen=True)
class Key:
    """What names a trunk."""

    parts: frozenset[tuple[Subject, BlockId]]
    precision: Precision


@dataclass
class Loaded:
    """A trunk and how many sessions use it."""

    trunk: Trunk
    users: int = 0


@dataclass
class Trunks:
    """The trunks of this node, the longest unused first."""

    store: Store
    supply: Supply
    holding: Holding
    _loaded: dict[Key, Loaded] = field(default_factory=dict)
    _loading: trio.Lock = field(default_factory=trio.Lock)
    _limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))
    _reading: frozenset[BlockId] = frozenset()  # the parts of one that is not in `_loaded` yet
    _gone: set[BlockId] = field(default_factory=set)  # let go, and their packs are still there

    def __post_init__(self) -> None:
        self.holding.memory.lender(Sort.IDLE, self._let_idle_go)

    @asynccontextmanager
    async def use(
        self, description: Description, heads: Parts, precision: Precision, progress: Progress
    ) -> AsyncIterator[tuple[Trunk, int]]:
        """The trunk at `heads`, and how many bytes were fetched for it. Raises `Refused`."""
        parts = {name: block for name, block in heads.items() if parse_subject(name).in_trunk}
        key = Key(frozenset(parts.items()), precision)
        async with self._loading:
            fetched = 0
            loaded = self._loaded.pop(key, None)
            if loaded is None:
                layouts = _trunk_of(description, heads)
                fetched = await self.supply.ensure(parts.values(), progress)
                loaded = Loaded(await self._load(description, layouts, parts, precision))
            self._loaded[key] = loaded
            loaded.users += 1
            self._reading = frozenset()
        try:
            await self._clear()
            yield loaded.trunk, fetched
        finally:
            loaded.users -= 1
            self._let_idle_go(0, idle_trunks_max)
            await self._clear()

    async def _load(
        self,
        description: Description,
        layouts: Sequence[SubjectLayout],
        parts: Parts,
        precision: Precision,
    ) -> Trunk:
        memory, blocks = self.holding.memory, frozenset(parts.values())
        size = sum(
            part_bytes(part, self.store.body(parts[part.subject])[1], precision) for part in layouts
        )
        if not await self.holding.room(size, Sort.PLACED):
            raise self._no_room(description, size)
        memory.trunks += size
        self._reading = blocks

        def read() -> Trunk:
            return Trunk(
                description.config,
                lambda name: pack(self.store, parts[name], blocks).tensors,
                self.holding.arithmetic,
                precision=precision,
            )

        try:
            await self.holding.clear()
            await self._clear()
            trunk = await in_turn(read, self._limiter)
        except BaseException:  # whatever it was, nothing is loaded
            memory.trunks -= size
            self._reading = frozenset()
            self._gone |= blocks
            await self._clear()
            raise
        memory.trunks -= size - trunk.bytes
        memory.copies(trunk.copied)
        converted = {parts[subject] for subject in trunk.converted}
        self._reading, self._gone = blocks - converted, self._gone | converted
        return trunk

    def _no_room(self, description: Description, size: int) -> Refused:
        memory = self.holding.memory
        used = f"experts take {memory.experts}, trunks and requests {memory.trunks + memory.caches}"
        ever = size <= memory.budget
        return Refused(
            ErrorCode.BUSY if ever and memory.caches else ErrorCode.NOT_ALLOWED,
            f"the trunk of {description.name} does not fit into this node's memory",
            f"it takes {size} bytes of {memory.budget} (--memory); {used}",
            "Drop experts, or start the node with a larger --memory."
            if ever
            else f"Start the node with --memory {-(-size // 2**20) + 64}MiB or more.",
            {"model": cid_text(description.model), "bytes": size, "memory": memory.budget},
        )

    def _let_idle_go(self, size: int, kept: int = 0) -> None:
        """Lets idle trunks go until `size` bytes are free, or until `kept` are left."""
        memory = self.holding.memory
        idle = [key for key, loaded in self._loaded.items() if not loaded.users]
        for key in idle[: max(0, len(idle) - kept)]:
            if size and memory.free >= size:
                break
            memory.trunks -= self._loaded.pop(key).trunk.bytes
            self._gone.update(block for _, block in key.parts)

    async def _clear(self) -> None:
        """Deletes the pack files of trunks that were let go."""
        used = {
            block
            for key, loaded in self._loaded.items()
            for subject, block in key.parts
            if subject not in loaded.trunk.converted
        }
        gone = self._gone - used - self._reading
        self._gone.clear()

        def clear() -> None:
            for block in gone:
                self.store.packs.drop(block)

        if gone:
            with trio.CancelScope(shield=True):  # who else would know of them? A few files
                await trio.to_thread.run_sync(clear, limiter=self._limiter)


def _trunk_of(description: Description, heads: Parts) -> Sequence[SubjectLayout]:
    """The parts of a trunk.

    Raises `Refused` (BAD_MODEL) if the configuration asks for a part that nobody published, be it
    of the trunk or an expert.
    """
    every = layout(description.config)
    for part in every:
        if part.subject not in heads:
            refuse(
                f"{description.name} has no {part.subject}, and its config.json asks for one",
                subject=part.subject,
            )
    return [part for part in every if part.kind is not Kind.EXPERT]
