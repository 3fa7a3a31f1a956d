"""Trunks that are loaded: everything of a model but its experts, shared by its sessions.

A trunk is named by the blocks that it is made of, so that two roots that differ in an expert only
share one. It stays while a session uses it, and a few stay afterwards.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from blyan_node.moe.trunk import Trunk
from blyan_node.services.holding import Holding
from blyan_node.services.models import Description
from blyan_node.services.supply import Progress, Supply
from protocols.ids import BlockId, Subject, parse_subject
from storage.store import Store

idle_trunks_max = 2

Parts = Mapping[Subject, BlockId]


@dataclass
class Loaded:
    """A trunk and how many sessions use it. `fetched` is the bytes that its first use fetched."""

    trunk: Trunk
    users: int = 0


@dataclass
class Trunks:
    """The trunks of this node, the longest unused first."""

    store: Store
    supply: Supply
    holding: Holding
    _loaded: dict[frozenset[tuple[Subject, BlockId]], Loaded] = field(default_factory=dict)
    _loading: trio.Lock = field(default_factory=trio.Lock)
    _limiter: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(1))

    @asynccontextmanager
    async def use(
        self, description: Description, heads: Parts, progress: Progress
    ) -> AsyncIterator[tuple[Trunk, int]]:
        """The trunk at `heads`, and how many bytes were fetched for it. Raises `Refused`."""
        parts = {name: block for name, block in heads.items() if parse_subject(name).expert is None}
        key = frozenset(parts.items())
        async with self._loading:
            fetched = 0
            loaded = self._loaded.pop(key, None)
            if loaded is None:
                fetched = await self.supply.ensure(parts.values(), progress)
                loaded = Loaded(await self._load(description, parts))
            self._loaded[key] = loaded
            loaded.users += 1
        try:
            yield loaded.trunk, fetched
        finally:
            loaded.users -= 1
            self._let_go()

    async def _load(self, description: Description, parts: Parts) -> Trunk:
        size = sum(self.holding.size_of(block) for block in parts.values())
        if not self.holding.make_room(size):
            self._let_go(0)

        def read() -> Trunk:
            return Trunk(description.config, lambda name: self.store.pack(parts[name]).tensors)

        trunk = await trio.to_thread.run_sync(read, limiter=self._limiter)
        self.holding.memory.trunks += trunk.bytes
        return trunk

    def _let_go(self, kept: int = idle_trunks_max) -> None:
        idle = [key for key, loaded in self._loaded.items() if not loaded.users]
        for key in idle[: max(0, len(idle) - kept)]:
            self.holding.memory.trunks -= self._loaded.pop(key).trunk.bytes
