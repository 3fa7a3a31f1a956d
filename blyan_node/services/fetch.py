"""Fetch: the bytes of blocks, from every peer that has them at once.

Each chunk is verified when it comes and stored durably before the next is counted, so a fetch that
is cut off, even by SIGKILL, goes on behind what is here. A peer that sends a wrong byte is scored
and asked no more. This service also answers `/blyan/chunks/1`, and brings back by itself what a
repair of the store found broken.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from blyan_node.network.errors import PeerGone
from blyan_node.network.interface import PeerNetwork
from blyan_node.services.asking import Answer, Asking, NobodyHas
from blyan_node.services.changes import Changes
from blyan_node.services.supply import Progress, silent
from protocols import limits
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import BlockId, ChunkHash, PeerId, cid_text, peer_id_of
from protocols.sync.messages import (
    CHUNKS,
    CHUNKS_PROTOCOL,
    Chunks,
    ChunksRequest,
    check_hashes,
    take_chunks,
)
from protocols.sync.plan import Assignment, ChunkPlan
from storage.errors import BlockMissing, Corrupt, DiskFull
from storage.gc import make_room
from storage.pins import Pin
from storage.store import Store

log = logging.getLogger(__name__)

Holders = Callable[[BlockId], Iterable[PeerId]]
MissingOf = dict[BlockId, list[tuple[ChunkHash, int]]]

MAKE_ROOM_CHUNKS = 16  # times what is needed now, so that it is not done for every chunk


class Fetch:
    """Chunks from peers, and for peers. `holders` says who is known to have a block."""

    def __init__(self, network: PeerNetwork, store: Store, holders: Holders) -> None:
        self._network = network
        self._store = store
        self._holders = holders
        self._writes = trio.CapacityLimiter(1)
        self._reads = trio.CapacityLimiter(2)
        self._busy: set[BlockId] = set()
        self._asked: Counter[BlockId] = (
            Counter()
        )  # for, by calls that run; what is here of it stays
        self._freed = Changes()
        self.received_bytes = 0  # of verified chunks
        self.served_bytes = 0
        network.handle(CHUNKS_PROTOCOL, CHUNKS, self._answer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Brings back broken blocks whenever a peer comes up, until cancelled."""
        events = self._network.peer_events()
        task_status.started()
        async for _ in events:
            await self._mend()

    async def fetch(
        self,
        blocks: Sequence[BlockId],
        progress: Progress = silent,
        by_peer: Counter[PeerId] | None = None,
    ) -> int:
        """Stores the missing chunks of the bodies of `blocks`; how many bytes came.

        The headers and manifests are here. Blocks that another call is fetching are waited for.
        `by_peer`, if given, is added the bytes that each peer brought.
        Raises `Refused`: no connected peer has a block (`BLOCK_MISSING`, with its subject and id),
        the disk is full.
        """
        wanted = tuple(dict.fromkeys(blocks))
        self._asked.update(wanted)
        try:
            return await self._complete(wanted, progress, Counter() if by_peer is None else by_peer)
        finally:
            self._asked -= Counter(wanted)

    async def _complete(
        self, wanted: Sequence[BlockId], progress: Progress, by_peer: Counter[PeerId]
    ) -> int:
        """Fetches until everything is here; how many bytes came."""
        came = 0
        while True:
            seen = self._freed.count
            missing = await self._missing(wanted)
            if not missing:
                return came
            ours = {block: chunks for block, chunks in missing.items() if block not in self._busy}
            if not ours:
                await self._freed.wait(seen)
                continue
            self._busy |= ours.keys()
            try:
                came += await self._fetch(ours, progress, by_peer)
            finally:
                self._busy -= ours.keys()
                self._freed.tell()

    async def _fetch(self, missing: MissingOf, progress: Progress, by_peer: Counter[PeerId]) -> int:
        plan = ChunkPlan()
        for block, chunks in missing.items():
            plan.want(chunks, group=block)
        sizes = {name: size for chunks in missing.values() for name, size in chunks}
        known = await trio.to_thread.run_sync(self._authors, tuple(missing), limiter=self._reads)

        async def ask(assignment: Assignment[ChunkHash]) -> Answer[ChunkHash]:
            asked = [(name, sizes[name]) for name in assignment.keys]
            answer = await self._ask(assignment.peer, asked)
            fresh = sum(sizes[name] for name in answer.arrived)
            progress(min(plan.bytes_done + fresh, plan.bytes_total), plan.bytes_total, "fetch")
            return answer

        def peers() -> Iterable[tuple[PeerId, bool]]:
            holders = known | {peer for block in missing for peer in self._holders(block)}
            return [(peer, peer in holders) for peer in self._network.peers]

        progress(0, plan.bytes_total, "fetch")
        try:
            await Asking(self._network, plan, ask, peers).run()
        except NobodyHas as error:
            raise self._unavailable(missing, set(error.keys)) from None
        finally:
            self.received_bytes += plan.bytes_done
            by_peer.update(plan.bytes_by_peer)
        return plan.bytes_done

    async def _ask(self, peer: PeerId, asked: list[tuple[ChunkHash, int]]) -> Answer[ChunkHash]:
        if peer not in self._network.peers:
            raise PeerGone(peer, "it left")
        request = ChunksRequest([bytes(name) for name, _ in asked])
        reply = await self._network.request(
            peer, CHUNKS_PROTOCOL, request, timeout_s=limits.chunks_request_s_max
        )
        if not isinstance(reply, Chunks):
            raise RemoteProtocolError(CHUNKS_PROTOCOL, "not a reply")
        keep = partial(self._keep, reply, asked)
        return await trio.to_thread.run_sync(keep, limiter=self._writes)

    def _keep(self, reply: Chunks, asked: list[tuple[ChunkHash, int]]) -> Answer[ChunkHash]:
        """Verifies and stores what came; raises `RemoteProtocolError`, `DiskFull`."""
        found, absent = take_chunks(reply, asked)
        try:
            self._store.chunks.put(found)
        except DiskFull:
            needed = sum(len(data) for _, data in found)
            if make_room(self._store, MAKE_ROOM_CHUNKS * needed, frozenset(self._asked)) < needed:
                raise
            self._store.chunks.put(found)
        return Answer([name for name, _ in found], absent)

    async def _missing(self, blocks: Sequence[BlockId]) -> MissingOf:
        def look() -> MissingOf:
            found = {block: self._store.missing_chunks(block) for block in blocks}
            return {block: chunks for block, chunks in found.items() if chunks}

        return await trio.to_thread.run_sync(look, limiter=self._reads)

    def _authors(self, blocks: Sequence[BlockId]) -> set[PeerId]:
        """The nodes that published the blocks: they keep what they published."""
        found = (self._store.block(id) for id in blocks)
        return {peer_id_of(block.header.author) for block in found if block is not None}

    def _unavailable(self, missing: MissingOf, keys: set[bytes]) -> Refused:
        lacking = [b for b, chunks in missing.items() if any(name in keys for name, _ in chunks)]
        block = self._store.block(lacking[0])
        what = "a block" if block is None else str(block.header.subject or block.header.kind)
        return Refused(
            ErrorCode.BLOCK_MISSING,
            f"{what} cannot be fetched",
            f"none of {len(self._network.peers)} connected peers has all of block "
            f"{cid_text(lacking[0])}" + (f" and {len(lacking) - 1} more" * (len(lacking) > 1)),
            "Start a node that stores it, or publish it again.",
            {"subject": what, "block": cid_text(lacking[0]), "blocks": len(lacking)},
        )

    async def _mend(self) -> None:
        """Fetches what a repair has dropped; what nobody has stays wanted."""
        wanted = await trio.to_thread.run_sync(self._store.wanted, limiter=self._reads)
        for block in wanted:
            try:
                await self.fetch([block])
                back = partial(self._store.unpin, block, reason=Pin.WANTED)
                await trio.to_thread.run_sync(back, limiter=self._writes)
            except BlockMissing:
                continue  # its header comes with sync
            except Refused as refused:
                log.warning("a broken block cannot be brought back yet: %s", refused)
                continue
            log.info("block %s is whole again", cid_text(block))

    async def _answer(self, peer: PeerId, message: object) -> Chunks:
        if not isinstance(message, ChunksRequest):
            raise RemoteProtocolError(CHUNKS_PROTOCOL, "not a request")
        check_hashes(message.hashes)
        read = partial(self._read, message.hashes)
        data = await trio.to_thread.run_sync(read, limiter=self._reads)
        self.served_bytes += sum(len(piece) for piece in data if piece is not None)
        return Chunks(data)

    def _read(self, hashes: Sequence[bytes]) -> list[bytes | None]:
        found: list[bytes | None] = []
        for name in hashes:
            try:
                data = self._store.get_chunk(ChunkHash(name))
                self._store.count_read(0 if data is None else len(data))
                found.append(data)
            except Corrupt as error:
                log.error("%s", error)
                found.append(None)
        return found
