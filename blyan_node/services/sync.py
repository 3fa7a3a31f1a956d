"""Sync: whatever was missed is caught up on, from every peer, and others are answered.

For each peer one walk goes through its acceptance log from where the last one ended, when the peer
comes up and every `limits.sync_every_s`. What a page names and is not here is fetched, headers
first and then manifests, from all connected peers at once; the cursor moves once all of it is here.
Two walks never fetch the same block. A block that gossip brought (`pull`) is completed the same
way: a release with its manifest, its body and what it lists.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import PeerNetwork, PeerUp
from blyan_node.services.acquire import Acquire, Unobtainable
from blyan_node.services.chain import Chain
from blyan_node.services.changes import Changes
from blyan_node.services.fetch import Fetch
from protocols import limits
from protocols.dag.admission import Parked
from protocols.dag.header import Block
from protocols.errors import Refused, RemoteProtocolError
from protocols.ids import BlockId, ManifestId, PeerId, cid_text
from protocols.rpc.node import Syncing
from protocols.sync.logs import LogWalk
from protocols.sync.messages import (
    SYNC,
    SYNC_PROTOCOL,
    Blocks,
    BlocksRequest,
    LogPage,
    LogRequest,
    Manifests,
    ManifestsRequest,
    check_ids,
    check_log_request,
    fill,
)

log = logging.getLogger(__name__)


class _Walker:
    """The walks through one peer's log."""

    def __init__(self) -> None:
        self.poked = Changes()
        self.walked = Changes()
        self.scope = trio.CancelScope()
        self.left = 0  # entries of its log behind the cursor
        self.target = 0  # blocks that we shall have if all of them are new


class Sync:
    """Catching up with peers, and answering them."""

    def __init__(self, network: PeerNetwork, chain: Chain, fetch: Fetch) -> None:
        self._network = network
        self._chain = chain
        self._store = chain.store
        self._acquire = Acquire(network, chain, fetch)
        self._reads = trio.CapacityLimiter(2)
        self._walkers: dict[PeerId, _Walker] = {}
        self._pulling: dict[BlockId, PeerId] = {}
        self._pulls = trio.CapacityLimiter(limits.sync_pulls_max)
        self._began: tuple[float, int] | None = None  # when catching up began, and with how much
        self.pulls_dropped = 0
        network.handle(SYNC_PROTOCOL, SYNC, self._answer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Walks through the log of every peer until cancelled."""
        events = self._network.peer_events()
        async with trio.open_nursery() as nursery:
            task_status.started()
            async for event in events:
                peer = event.peer.peer_id
                if not isinstance(event, PeerUp):
                    if peer not in self._network.peers and (gone := self._walkers.get(peer)):
                        gone.scope.cancel()
                elif peer not in self._walkers:
                    self._walkers[peer] = _Walker()
                    nursery.start_soon(self._follow, peer)

    def syncing(self) -> Syncing | None:
        """How far catching up is, in blocks; None while this node is level with its peers."""
        targets = [walker.target for walker in self._walkers.values() if walker.left]
        if not targets or self._began is None:
            return None
        since, before = self._began
        have = self._store.stats().accepted
        want = max(have, *targets)
        done, spent = have - before, trio.current_time() - since
        eta_s = (want - have) * spent / done if done > 0 else None
        return Syncing(have=have, want=want, eta_s=eta_s)

    async def pull(self, block: Block, source: PeerId) -> None:
        """Takes a block that gossip brought, with all that it needs; gives up quietly.

        Bounded: one pull for a block, a few for a source and for all. What is dropped here comes
        with the next walk.
        """
        mine = sum(peer == source for peer in self._pulling.values())
        if block.id in self._pulling:
            return
        if mine >= limits.sync_pulls_per_peer_max or self._pulls.available_tokens < 1:
            self.pulls_dropped += 1
            self.poke(source)
            return
        self._pulling[block.id] = source
        try:
            async with self._pulls:
                await self._complete(block, source)
        except (Unobtainable, PeerGone, PeerRefused, RequestTimeout, Refused) as error:
            log.info("block %s is not complete yet: %s", cid_text(block.id), error)
        except RemoteProtocolError as error:
            log.info("block %s is refused: %s", cid_text(block.id), error)
        finally:
            del self._pulling[block.id]

    def poke(self, peer: PeerId) -> None:
        """Has the peer's log walked soon."""
        if walker := self._walkers.get(peer):
            walker.poked.tell()

    async def _complete(self, block: Block, source: PeerId) -> None:
        for _ in range(limits.sync_pull_rounds_max):
            verdict = (await self._chain.submit([block], [], source))[0].verdict
            if isinstance(verdict, RemoteProtocolError):
                raise verdict
            if not isinstance(verdict, Parked):
                return
            if verdict.blocks and not verdict.bodies:
                await self._obtain_or_walk(sorted(verdict.blocks), source)
            elif verdict.unaccepted:
                await self._walk_soon(source)
            else:
                await self._acquire.complete(block, verdict, source)
        raise Unobtainable("it still waits for others")

    async def _obtain_or_walk(self, ids: Sequence[BlockId], source: PeerId) -> None:
        for at in range(0, len(ids), limits.sync_page_ids_max):
            try:
                await self._acquire.obtain(ids[at : at + limits.sync_page_ids_max], source)
            except Unobtainable:
                await self._walk_soon(source)
                return

    async def _walk_soon(self, peer: PeerId) -> None:
        """Has the peer's log walked, and waits for that."""
        walker = self._walkers.get(peer)
        if walker is None:
            raise Unobtainable("its source is gone")
        seen = walker.walked.count
        walker.poked.tell()
        with trio.move_on_after(limits.sync_every_s):
            await walker.walked.wait(seen)

    async def _follow(self, peer: PeerId) -> None:
        """Walks when the peer has come up, when poked, and every now and then."""
        walker = self._walkers[peer]
        retry_s: float = limits.sync_retry_s
        while peer in self._network.peers:
            seen = walker.poked.count
            with trio.CancelScope() as walker.scope:
                level = await self._try_walk(peer, walker)
                pause_s = limits.sync_every_s if level else min(retry_s, limits.sync_every_s)
                retry_s = limits.sync_retry_s if level else retry_s * 2
                with trio.move_on_after(pause_s):
                    await walker.poked.wait(seen)
        del self._walkers[peer]

    async def _try_walk(self, peer: PeerId, walker: _Walker) -> bool:
        """Whether the walk came to the end of the log."""
        try:
            await self._walk(peer, walker)
            return True
        except (PeerGone, PeerRefused, RequestTimeout, Unobtainable, Refused) as error:
            log.info("catching up with %s is put off: %s", peer, error)
        except RemoteProtocolError as error:
            log.warning("the log of %s: %s", peer, error)
            self._network.penalise(peer, error)
        finally:
            self._note(walker, 0)
            walker.walked.tell()
        return False

    async def _walk(self, peer: PeerId, walker: _Walker) -> None:
        walk = LogWalk(partial(self._store.cursor, peer))
        while not walk.ended:
            reply = await self._network.request(peer, SYNC_PROTOCOL, walk.request())
            if not isinstance(reply, LogPage):
                raise RemoteProtocolError(SYNC_PROTOCOL, "not a page of a log")
            page = walk.page(reply)
            self._note(walker, walk.left)
            if page is not None:
                await self._acquire.obtain(page.ids, peer)
                here = self._store.stats()
                if page.next > here.accepted + here.staged:  # else it could go on for ever
                    raise RemoteProtocolError(SYNC_PROTOCOL, "its log names blocks repeatedly")
                walk.done()
                keep = partial(self._store.set_cursor, peer, page.log_id, page.next)
                await trio.to_thread.run_sync(keep, limiter=self._reads)
                self._note(walker, walk.left)

    def _note(self, walker: _Walker, left: int) -> None:
        walker.left = left
        walker.target = self._store.stats().accepted + left
        if not any(w.left for w in self._walkers.values()):
            self._began = None
        elif self._began is None:
            self._began = (trio.current_time(), self._store.stats().accepted)

    # Answering

    async def _answer(self, peer: PeerId, message: object) -> LogPage | Blocks | Manifests:
        work: Callable[[], LogPage | Blocks | Manifests]
        match message:
            case LogRequest():
                check_log_request(message)
                work = partial(self._page, message)
            case BlocksRequest(ids=ids):
                check_ids(ids, limits.sync_headers_max)
                work = partial(self._blocks, ids)
            case ManifestsRequest(ids=ids):
                check_ids(ids, limits.sync_manifests_max)
                work = partial(self._manifests, ids)
            case _:
                raise RemoteProtocolError(SYNC_PROTOCOL, "not a request")
        return await trio.to_thread.run_sync(work, limiter=self._reads)

    def _page(self, request: LogRequest) -> LogPage:
        end = self._store.stats().accepted
        rows = self._store.log(request.after, request.limit)
        last = rows[-1][0] if rows else request.after
        return LogPage(self._store.log_id, [bytes(id) for _, id in rows], last, max(end, last))

    def _blocks(self, ids: Iterable[bytes]) -> Blocks:
        found = ((id, self._store.block(BlockId(id))) for id in ids)
        return Blocks(*fill((id, None if b is None else b.encode()) for id, b in found))

    def _manifests(self, ids: Iterable[bytes]) -> Manifests:
        return Manifests(*fill((id, self._store.manifest_bytes(ManifestId(id))) for id in ids))
