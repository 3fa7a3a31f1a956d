"""Nodes for tests of the chain: a store, the chain and its services over the in-process network."""

import contextlib
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

import trio

from blyan_node.services.chain import Chain
from blyan_node.services.fetch import Fetch
from blyan_node.services.gossip import Gossip
from blyan_node.services.sync import Sync
from blyan_node.testing.blocks import NOW_MS, Author, Made, identity
from blyan_node.testing.network import NETWORK, Fabric, TwinNetwork
from protocols.ids import BlockId, PeerId
from storage.memory import MemoryEngine
from storage.store import Store

DRIFT_MS = 10_000


class ChainNode:
    """One node. Its `author` signs with the key that is its peer id."""

    def __init__(self, fabric: Fabric, name: str, directory: Path, store: Store | None = None):
        self.name = name
        self.author = Author(name, NETWORK)
        self.network: TwinNetwork = fabric.node(identity(name))
        self.store = store or Store(
            MemoryEngine(), MemoryEngine(), directory, free_bytes=lambda: 1 << 40
        )
        self.chain = Chain(self.store, NETWORK, lambda: NOW_MS + DRIFT_MS)
        self.holders: dict[BlockId, list[PeerId]] = {}
        self.fetch = Fetch(self.network, self.store, lambda block: self.holders.get(block, []))
        self.sync = Sync(self.network, self.chain, self.fetch)
        self.gossip = Gossip(self.network, self.chain, self.sync)

    @property
    def peer_id(self) -> PeerId:
        """The node's name in the network."""
        return self.network.peer_id

    @property
    def log(self) -> set[BlockId]:
        """The ids of all accepted blocks."""
        return {id for _, id in self.store.log(0, self.store.stats().accepted)}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs the network and every service until the network is killed."""
        async with trio.open_nursery() as nursery:
            for service in (self.fetch, self.sync, self.gossip):
                await nursery.start(service.run)
            task_status.started()
            await self.network.run()
            nursery.cancel_scope.cancel()

    async def publish(self, made: Iterable[Made]) -> None:
        """Writes bodies and submits blocks of our own, in order."""
        for one in made:
            self.store.put_chunks(one.chunks)
            if one.subjects is not None:
                self.store.stage([], release_subjects={one.id: one.subjects})
            await self.chain.submit([one.block], [(one.manifest_id, one.manifest_bytes)], None)

    async def has(self, made: Sequence[Made]) -> None:
        """Waits until all of these are accepted here."""
        await self.chain.wait_for(lambda: {m.id for m in made} <= self.log)


@contextlib.asynccontextmanager
async def running(*nodes: ChainNode) -> AsyncIterator[trio.Nursery]:
    """Nodes that run while the body of the `async with` does."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        yield nursery
        nursery.cancel_scope.cancel()
