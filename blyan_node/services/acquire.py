"""Getting blocks by their ids: headers, then manifests, then the bodies of releases.

All that is asked of peers goes through fetch plans, so several peers share the work and one that
does not have something is not waited for. What comes is verified and submitted as it comes; what
is submitted before its parents waits in the chain's pool.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import trio

from blyan_node.network.interface import PeerNetwork
from blyan_node.services.asking import Answer, Asking, NobodyHas
from blyan_node.services.chain import Chain
from blyan_node.services.changes import Changes
from blyan_node.services.fetch import Fetch
from blyan_node.services.intake import Outcome
from protocols import limits
from protocols.dag.admission import Parked, waits_for_release
from protocols.dag.header import Block, Kind
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ManifestId, PeerId, cid_text, peer_id_of
from protocols.sync.messages import (
    SYNC_PROTOCOL,
    Blocks,
    BlocksRequest,
    Manifests,
    ManifestsRequest,
    take_blocks,
    take_manifests,
)
from protocols.sync.plan import Assignment, FetchPlan, PlanLimits
from storage.errors import BlockMissing

K = TypeVar("K", bound=bytes)
T = TypeVar("T")

HEADERS = PlanLimits(
    batch=limits.sync_headers_max,
    in_flight=limits.sync_headers_max * limits.sync_requests_per_peer_max,
)
MANIFESTS = PlanLimits(
    batch=limits.sync_manifests_max,
    in_flight=limits.sync_manifests_max * limits.sync_requests_per_peer_max,
)


class Unobtainable(Exception):
    """What is wanted cannot be had now; it may be later."""


class Acquire:
    """Brings blocks into the chain from whoever has them."""

    def __init__(self, network: PeerNetwork, chain: Chain, fetch: Fetch) -> None:
        self._network = network
        self._chain = chain
        self._store = chain.store
        self._fetch = fetch
        self._reads = trio.CapacityLimiter(2)
        self._busy: set[BlockId] = set()
        self._freed = Changes()

    async def obtain(self, ids: Sequence[BlockId], owner: PeerId) -> None:
        """Returns when every one of `ids` is accepted, or is staged until its release comes.

        At most a page of ids, parents first; `owner` is who named them. Blocks that another call
        is getting are waited for. Raises `Unobtainable`, and `RemoteProtocolError` if one of them
        can never be accepted, which is the owner's fault.
        """
        left, idle_rounds = len(ids) + 1, 0
        while idle_rounds < limits.sync_idle_rounds_max:
            seen = self._freed.count
            wanted = await self._in_thread(partial(self._wanted, ids))
            if not wanted:
                return
            ours = [id for id in wanted if id not in self._busy]
            if not ours:
                await self._freed.wait(seen)
                continue
            idle_rounds = 0 if len(wanted) < left else idle_rounds + 1
            left = min(left, len(wanted))
            self._busy.update(ours)
            try:
                await self._bring(ours, owner)
            finally:
                self._busy.difference_update(ours)
                self._freed.tell()
        raise Unobtainable(f"{left} blocks wait for others that are not here")

    async def complete(self, block: Block, parked: Parked, owner: PeerId) -> None:
        """Brings the manifest and, for a release, the body that a parked block waits for."""
        if parked.manifests:
            await self._manifests_for([block], owner)
        elif block.id in parked.bodies:
            await self._body(block, owner)

    async def _bring(self, ids: Sequence[BlockId], owner: PeerId) -> None:
        """Takes in what peers have of `ids`, and what these wait for that had gone again."""
        ordered, waits = await self._take_in(ids, owner)
        for block in ordered:
            if block.header.kind is Kind.RELEASE and not self._store.is_accepted(block.id):
                waits |= await self._body(block, owner)
        # Staged blocks that an earlier page named may have been dropped since, for want of room.
        lacking = sorted(waits.difference(ids))
        for at in range(0, len(lacking), limits.sync_page_ids_max):
            await self._take_in(lacking[at : at + limits.sync_page_ids_max], owner)
        if len(ordered) < len(ids):
            raise Unobtainable(f"nobody has {len(ids) - len(ordered)} blocks")

    async def _take_in(
        self, ids: Sequence[BlockId], owner: PeerId
    ) -> tuple[list[Block], set[BlockId]]:
        """Headers and manifests: the blocks of `ids` that came, and those that they wait for."""
        known = await self._in_thread(lambda: [self._store.block(id) for id in ids])
        blocks = {block.id: block for block in known if block is not None}
        with contextlib.suppress(Unobtainable):  # what did come is taken in all the same
            await self._headers([id for id in ids if id not in blocks], blocks, owner)
        ordered = [blocks[id] for id in ids if id in blocks]
        lacking = await self._in_thread(partial(self._without_manifest, ordered))
        whole = [block for block in ordered if block not in lacking]
        outcomes = await self._chain.submit(whole, [], owner)
        _check(outcomes, owner)
        if lacking:
            outcomes += await self._manifests_for(lacking, owner)
        return ordered, _waited_for(outcomes)

    async def _headers(
        self, ids: Sequence[BlockId], into: dict[BlockId, Block], owner: PeerId
    ) -> None:
        plan = FetchPlan(((id, limits.header_bytes_max) for id in ids), HEADERS)

        async def ask(assignment: Assignment[BlockId]) -> Answer[BlockId]:
            request = BlocksRequest([bytes(id) for id in assignment.keys])
            reply = await self._network.request(assignment.peer, SYNC_PROTOCOL, request)
            if not isinstance(reply, Blocks):
                raise RemoteProtocolError(SYNC_PROTOCOL, "not blocks")
            take = partial(
                take_blocks,
                reply,
                assignment.keys,
                network=self._chain.network,
                now_ms=self._chain.clock_ms(),
            )
            found, missing = await self._in_thread(take)
            into.update(found)
            return Answer(list(found), missing)

        await self._run(plan, ask, owner)

    async def _manifests_for(self, blocks: Sequence[Block], owner: PeerId) -> list[Outcome]:
        """Gets the manifests of blocks and submits each block when its own has come."""
        of: dict[ManifestId, list[Block]] = {}
        for block in blocks:
            if block.header.body is not None:
                of.setdefault(block.header.body, []).append(block)
        plan = FetchPlan(((id, 1) for id in of), MANIFESTS)
        outcomes: list[Outcome] = []

        async def ask(assignment: Assignment[ManifestId]) -> Answer[ManifestId]:
            request = ManifestsRequest([bytes(id) for id in assignment.keys])
            reply = await self._network.request(assignment.peer, SYNC_PROTOCOL, request)
            if not isinstance(reply, Manifests):
                raise RemoteProtocolError(SYNC_PROTOCOL, "not manifests")
            take = partial(take_manifests, reply, assignment.keys)
            found, missing = await self._in_thread(take)
            ready = [block for id in assignment.keys if id in found for block in of[id]]
            rows = [(id, raw) for id, (_, raw) in found.items()]
            outcomes.extend(await self._chain.submit(ready, rows, owner))
            return Answer(list(found), missing)

        await self._run(plan, ask, owner, *(peer_id_of(b.header.author) for b in blocks[:1]))
        _check(outcomes, owner)
        return outcomes

    async def _body(self, release: Block, owner: PeerId) -> set[BlockId]:
        """Gets the body of a staged release and has it decided about; what it waits for."""
        if self._store.block(release.id) is None or self._store.is_accepted(release.id):
            return set()
        try:
            if self._store.release_subjects(release.id) is None:
                await self._fetch.fetch([release.id])
            outcomes = await self._chain.read_release(release, owner)
        except BlockMissing as error:
            raise Unobtainable(str(error)) from None
        _check(outcomes, owner)
        return _waited_for(outcomes)

    async def _run(
        self,
        plan: FetchPlan[K],
        ask: Callable[[Assignment[K]], Awaitable[Answer[K]]],
        *owners: PeerId,
    ) -> None:
        def peers() -> Iterator[tuple[PeerId, bool]]:
            for peer in self._network.peers:
                yield peer, peer in owners

        try:
            await Asking(self._network, plan, ask, peers).run()
        except NobodyHas as error:
            first = cid_text(error.keys[0])
            raise Unobtainable(f"nobody has {len(error.keys)} blocks, {first} first") from None

    def _wanted(self, ids: Iterable[BlockId]) -> list[BlockId]:
        """Which of `ids` are not here for good."""
        wanted = []
        for id in ids:
            kept = self._store.kept(id)
            if kept is None or (kept.seq == 0 and not waits_for_release(kept.block)):
                wanted.append(id)
        return wanted

    def _without_manifest(self, blocks: Sequence[Block]) -> list[Block]:
        here = self._store.manifest_bytes
        return [b for b in blocks if b.header.body is not None and here(b.header.body) is None]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await trio.to_thread.run_sync(work, limiter=self._reads)


def _waited_for(outcomes: Iterable[Outcome]) -> set[BlockId]:
    """The blocks that are not here and that others wait for."""
    parked = (o.verdict for o in outcomes if isinstance(o.verdict, Parked))
    return {id for verdict in parked for id in verdict.blocks}


def _check(outcomes: Iterable[Outcome], owner: PeerId) -> None:
    """Raises what makes one of the owner's blocks one that nobody honest names."""
    for outcome in outcomes:
        if outcome.source == owner and isinstance(outcome.verdict, RemoteProtocolError):
            raise outcome.verdict
