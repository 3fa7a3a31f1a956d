"""Nodes of one process that hold, serve and answer: the services of inference on twin networks.

The chain is replaced by what a finished sync leaves behind: `share` gives every store the blocks
that one node has published, without their chunks, and fetching copies chunks from node to node.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from blyan_node.moe.devices import OnDevice
from blyan_node.moe.profile import Profiles, profile
from blyan_node.services.authoring import Author
from blyan_node.services.chain import Chain
from blyan_node.services.directory import AdvertConfig, Adverts
from blyan_node.services.generation import Generation
from blyan_node.services.held import Reason
from blyan_node.services.holding import Holding
from blyan_node.services.layers import Layers
from blyan_node.services.models import Models
from blyan_node.services.publish import Publish, Published
from blyan_node.services.serving import Serving
from blyan_node.services.supply import Progress, Supply
from blyan_node.services.texts import Texts
from blyan_node.services.trunks import Trunks
from blyan_node.services.update import Update, Updated
from blyan_node.testing.arithmetic import best
from blyan_node.testing.blocks import NOW_MS, identity
from blyan_node.testing.network import NETWORK, Fabric
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused
from protocols.experts.advert import Role
from protocols.ids import BlockId, ChunkHash, PeerId, Subject, cid_text
from protocols.precision import PUBLISHED, Precision
from storage.store import Store, open_store

PROFILE = profile(best().name)


class CopyFetch:
    """Copies chunks from the stores of running nodes; `copied` counts bytes."""

    def __init__(self, swarm: "Swarm", store: Store) -> None:
        self._swarm = swarm
        self._store = store
        self.copied = 0

    async def fetch(self, blocks: Sequence[BlockId], progress: Progress) -> int:
        """Raises `Refused` for a block of which a chunk is nowhere."""
        await trio.lowlevel.checkpoint()
        came = 0
        for done, block in enumerate(blocks):
            for name, size in self._store.missing_chunks(block):
                data = self._swarm.find_chunk(name)
                if data is None:
                    raise Refused(
                        ErrorCode.BLOCK_MISSING,
                        "a block cannot be fetched",
                        "no connected peer has all of it",
                        data={"block": cid_text(block)},
                    )
                self._store.put_chunks([(name, data)])
                came += size
            progress(done + 1, len(blocks), "blocks")
        self.copied += came
        return came


class SwarmNode:
    """One node: its store, and its services in the order in which they depend on each other."""

    def __init__(
        self,
        swarm: "Swarm",
        name: str,
        role: Role,
        memory: int,
        *,
        auto: bool = False,
        precision: Precision = PUBLISHED,
        device: OnDevice | None = None,
    ) -> None:
        numbers = device or best()
        profiles = Profiles(numbers.name, precision, "far" if device else "cpu")
        self.name = name
        self.swarm = swarm
        self.identity = identity(name)
        self.store = open_store(swarm.directory / name)
        self.network = swarm.fabric.node(self.identity, role=role, profile=profiles.own)
        self._scope = trio.CancelScope()
        self.chain = Chain(self.store, NETWORK, lambda: NOW_MS)
        self.fetch = CopyFetch(swarm, self.store)
        self.supply = Supply(self.store, self.fetch)
        self.models = Models(self.store, self.supply)
        self.holding = Holding(self.store, self.supply, self.models, memory, numbers, precision)
        self.compute = trio.CapacityLimiter(1)
        self.serving = Serving(self.network, self.holding, profiles.own, self.compute)
        self.adverts = Adverts(
            self.network,
            self.identity,
            AdvertConfig(NETWORK, role, profiles.own, auto),
            self.holding,
            lambda: self.serving.queue_length,
            lambda: NOW_MS + int(trio.current_time() * 1000) % 10**9,
        )
        self.layers = Layers(self.network, self.adverts, self.holding, self.compute)
        self.trunks = Trunks(self.store, self.supply, self.holding)
        self.texts = Texts()
        self.generation = Generation(
            self.chain,
            self.store,
            self.models,
            self.texts,
            self.trunks,
            self.layers,
            self.compute,
            profiles,
        )

    @property
    def peer_id(self) -> PeerId:
        """The node's id."""
        return self.network.peer_id

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Runs until cancelled or killed."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.network.run)
            await nursery.start(self.serving.run)
            await nursery.start(self.adverts.run)
            await nursery.start(self.texts.run)
            self.swarm.running[self.peer_id] = self
            self._scope = nursery.cancel_scope
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                del self.swarm.running[self.peer_id]

    def kill(self) -> None:
        """Ends `run` from outside; the network is gone first, so nothing is said any more."""
        self.network.kill()
        self._scope.cancel()

    async def sees(self, holders: int) -> None:
        """Waits until this node knows so many holders, of all experts together."""
        directory = self.adverts.directory
        with trio.fail_after(30):
            while sum(len(peers) for _, peers in directory.experts()) != holders:
                await self.adverts.changes.wait()

    async def publish(self, path: Path, name: str) -> Published:
        """Publishes a checkpoint here, and gives its blocks to every node."""
        author = Author(self.store, self.identity, NETWORK, lambda: NOW_MS)
        limiter = trio.CapacityLimiter(1)
        published = await Publish(self.store, self.chain, author, limiter).publish(path, name)
        await self.swarm.share(self)
        return published

    async def update(self, model: BlockId, subject: Subject, weights: Path) -> Updated:
        """Replaces one part of a model here, and gives the block to every node."""
        author = Author(self.store, self.identity, NETWORK, lambda: NOW_MS)
        update = Update(self.store, self.chain, author, trio.CapacityLimiter(1))
        updated = await update.update(model, subject, weights)
        await self.swarm.share(self)
        return updated

    async def hold(self, model: BlockId, subjects: Iterable[str]) -> None:
        """Holds experts by order, fetching what is missing."""
        heads = self.store.heads(model)
        for subject in subjects:
            await self.holding.keep(heads[Subject(subject)], Reason.ORDER)


class Swarm:
    """The nodes of one test and the medium between them."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self.directory = directory
        self.fabric = Fabric(seed)
        self.nodes: dict[str, SwarmNode] = {}
        self.running: dict[PeerId, SwarmNode] = {}

    def node(
        self,
        name: str,
        role: Role = "gpu",
        memory: int = 1 << 30,
        *,
        auto: bool = False,
        precision: Precision = PUBLISHED,
        device: OnDevice | None = None,
    ) -> SwarmNode:
        """Makes a node that computes on a device or as best it can; `started` runs it."""
        self.nodes[name] = SwarmNode(
            self, name, role, memory, auto=auto, precision=precision, device=device
        )
        return self.nodes[name]

    async def share(self, source: SwarmNode) -> None:
        """Gives every other node the accepted blocks of `source`, with the chunks of releases."""
        known = [b for _, id in source.store.log(0, 1_000_000) if (b := source.store.block(id))]
        bodies = {block.header.body for block in known if block.header.body is not None}
        rows = [(id, data) for id in bodies if (data := source.store.manifest_bytes(id))]
        releases = [block for block in known if block.header.kind is Kind.RELEASE]
        for node in self.nodes.values():
            if node is source:
                continue
            for release in releases:
                for name, _ in source.store.body(release.id)[1].chunks():
                    node.store.put_chunks([(name, source.store.get_chunk(name) or b"")])
            await node.chain.submit(known, rows, source.peer_id)
            for release in releases:
                if not node.store.is_accepted(release.id):
                    await node.chain.read_release(release, source.peer_id)
            assert node.store.models() == source.store.models()

    def find_chunk(self, name: ChunkHash) -> bytes | None:
        """A chunk from any running node's store."""
        for node in self.running.values():
            if (data := node.store.get_chunk(name)) is not None:
                return data
        return None

    @asynccontextmanager
    async def started(self) -> AsyncIterator[trio.Nursery]:
        """Runs every node that was made so far, and closes the stores at the end."""
        try:
            async with trio.open_nursery() as nursery:
                for node in self.nodes.values():
                    await nursery.start(node.run)
                yield nursery
                nursery.cancel_scope.cancel()
        finally:
            for node in self.nodes.values():
                node.store.close()
