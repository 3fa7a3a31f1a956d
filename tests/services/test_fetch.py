"""Fetching chunks: from several peers, verified, resumed, and in spite of liars."""

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from blyan_node.network.errors import PeerGone
from blyan_node.testing.blocks import Made
from blyan_node.testing.chain_nodes import ChainNode, running
from blyan_node.testing.network import Fabric
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.ids import PeerId, cid_text
from protocols.sync.messages import CHUNKS_PROTOCOL, Chunks, ChunksRequest
from storage.memory import MemoryEngine
from storage.pins import Pin
from storage.store import Store

SIZE = 10 * limits.chunk_bytes + 100


def weights(seed: int) -> bytes:
    return random.Random(seed).randbytes(SIZE)


def big_publish(node: ChainNode, subjects: int = 3) -> list[Made]:
    model = node.author.model()
    parts = [node.author.part(model.id, f"layer0.expert{i}", weights(i)) for i in range(subjects)]
    return [model, *parts, node.author.release(model.id, parts)]


@contextlib.asynccontextmanager
async def swarm(tmp_path: Path, *names: str) -> AsyncIterator[tuple[list[ChainNode], list[Made]]]:
    """Nodes that know the chain; alice has published and keeps all bodies, the others none."""
    fabric = Fabric()
    nodes = [ChainNode(fabric, name, tmp_path) for name in names]
    async with running(*nodes):
        published = big_publish(nodes[0])
        await nodes[0].publish(published)
        for node in nodes[1:]:
            await node.has(published)
        yield nodes, published


def give(node: ChainNode, made: list[Made]) -> None:
    for one in made:
        node.store.put_chunks(one.chunks)


@trio_test
async def test_chunks_come_from_more_than_one_peer_at_once(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob", "carol") as ((alice, bob, carol), published):
        give(bob, published)
        parts = [m.id for m in published[1:4]]
        seen: list[tuple[int, int | None, str]] = []
        by_peer: Counter[PeerId] = Counter()
        came = await carol.fetch.fetch(parts, lambda *now: seen.append(now), by_peer)
        assert came == 3 * SIZE
        assert all(carol.store.is_stored(id) for id in parts)
        assert set(by_peer) == {alice.peer_id, bob.peer_id}
        assert by_peer.total() == came
        body = sum(len(data) for _, data in published[-1].chunks)  # of the release, which sync got
        assert carol.fetch.received_bytes == came + body
        assert alice.fetch.served_bytes + bob.fetch.served_bytes == came + 2 * body
        assert seen[0][:2] == (0, came) and seen[-1][:2] == (came, came)
        assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
        assert await carol.fetch.fetch(parts) == 0


@trio_test
async def test_a_fetch_that_was_cut_off_does_not_fetch_twice(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((alice, bob), published):
        before = alice.fetch.served_bytes
        part = published[1].id
        with trio.CancelScope() as scope:

            def stop_half_way(done: int, total: int | None, what: str) -> None:
                if done > SIZE // 3:
                    scope.cancel()

            await bob.fetch.fetch([part], stop_half_way)
        assert scope.cancelled_caught and not bob.store.is_stored(part)
        left = sum(size for _, size in bob.store.missing_chunks(part))
        assert 0 < left < SIZE
        assert await bob.fetch.fetch([part]) == left
        assert bob.store.is_stored(part)
        wasted = limits.chunks_in_flight_per_peer_max * limits.chunk_bytes
        assert SIZE <= alice.fetch.served_bytes - before <= SIZE + wasted


@trio_test
async def test_a_lying_peer_is_scored_and_replaced(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob", "mallory") as ((alice, bob, mallory), published):

        async def lie(peer: PeerId, message: object) -> Chunks:
            assert isinstance(message, ChunksRequest)
            return Chunks([bytes(limits.chunk_bytes) for _ in message.hashes])

        codec, _ = mallory.network.calls.handlers[CHUNKS_PROTOCOL]
        mallory.network.calls.handlers[CHUNKS_PROTOCOL] = (codec, lie)
        parts = [m.id for m in published[1:4]]
        bob.holders = {part: [mallory.peer_id] for part in parts}
        by_peer: Counter[PeerId] = Counter()
        assert await bob.fetch.fetch(parts, by_peer=by_peer) == 3 * SIZE
        assert all(bob.store.is_stored(id) for id in parts)
        assert set(by_peer) == {alice.peer_id}
        assert bob.network._scores[mallory.peer_id] < 0
        assert not bob.network._scores.get(alice.peer_id)


@trio_test
async def test_answers_of_the_wrong_shape_cost_score_too(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "mallory") as ((alice, mallory), published):

        async def lie(peer: PeerId, message: object) -> Chunks:
            return Chunks([])

        codec, _ = alice.network.calls.handlers[CHUNKS_PROTOCOL]
        alice.network.calls.handlers[CHUNKS_PROTOCOL] = (codec, lie)
        with pytest.raises(Refused, match=r"layer0\.expert0 cannot be fetched"):
            await mallory.fetch.fetch([published[1].id])
        assert mallory.network._scores[alice.peer_id] < 0


@trio_test
async def test_what_nobody_has_is_named(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob", "carol") as ((alice, bob, carol), published):
        alice.network.kill()
        while alice.peer_id in carol.network.peers:
            await trio.sleep(0)
        with pytest.raises(Refused, match="none of 1 connected peers") as refused:
            await carol.fetch.fetch([published[2].id])
        assert refused.value.code is ErrorCode.BLOCK_MISSING
        assert refused.value.data["subject"] == "layer0.expert1"
        assert refused.value.data["block"] == cid_text(published[2].id)
        give(bob, published)
        assert await carol.fetch.fetch([published[2].id]) == SIZE


@trio_test
async def test_a_peer_that_leaves_half_way_is_replaced(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob", "carol") as ((_, bob, carol), published):
        give(bob, published)
        parts = [m.id for m in published[1:4]]

        def leave(done: int, total: int | None, what: str) -> None:
            if done > SIZE:
                bob.network.kill()

        assert await carol.fetch.fetch(parts, leave) == 3 * SIZE
        assert all(carol.store.is_stored(id) for id in parts)


@trio_test
async def test_when_the_last_peer_leaves_it_is_said_at_once(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((alice, bob), published):

        def leave(done: int, total: int | None, what: str) -> None:
            if done > SIZE:
                alice.network.kill()

        with pytest.raises(Refused, match="none of 0 connected peers"):
            await bob.fetch.fetch([m.id for m in published[1:4]], leave)


@trio_test
async def test_a_connected_peer_that_cannot_be_asked_is_not_asked_for_ever(
    tmp_path: Path,
) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((alice, bob), published):
        asked = 0

        async def gone(*args: object, **kwargs: object) -> object:
            nonlocal asked
            asked += 1
            raise PeerGone(alice.peer_id, "its stream broke")

        bob.network.request = gone  # type: ignore[method-assign]
        with pytest.raises(Refused, match="none of 1 connected peers"):
            await bob.fetch.fetch([published[1].id])
        assert asked <= 2 * limits.fetch_failures_max


@trio_test
async def test_two_fetches_of_one_block_share_the_work(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((alice, bob), published):
        before = alice.fetch.served_bytes
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(bob.fetch.fetch, [published[1].id])
        assert alice.fetch.served_bytes - before == SIZE


@trio_test
async def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    fabric = Fabric()
    alice = ChainNode(fabric, "alice", tmp_path)
    quota = 5 * limits.chunk_bytes
    store = Store(
        MemoryEngine(),
        MemoryEngine(),
        tmp_path,
        quota_bytes=quota,
        free_bytes=lambda: 1 << 40,
    )
    bob = ChainNode(fabric, "bob", tmp_path, store=store)
    async with running(alice, bob):
        published = big_publish(alice)
        await alice.publish(published)
        await bob.has(published)
        with pytest.raises(Refused, match="--disk allows") as full:
            await bob.fetch.fetch([published[1].id])
        assert full.value.code is ErrorCode.DISK_FULL
        assert 0 < bob.store.stats().chunk_bytes <= quota
        update = alice.author.update(published[1], b"small")
        await alice.publish([update])
        await bob.has([update])


@trio_test
async def test_what_a_repair_dropped_comes_back_by_itself(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((_, bob), published):
        bob.store.pin(published[1].id, reason=Pin.WANTED)
        await bob.fetch._mend()
        assert bob.store.is_stored(published[1].id)
        assert bob.store.wanted() == []


@trio_test
async def test_malformed_requests_cost_the_asker(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "mallory") as ((alice, mallory), _published):
        for hashes in ([], [b"short"], [bytes(32)] * 2, [bytes([i]) * 32 for i in range(9)]):
            with contextlib.suppress(Exception):  # how the asker sees it is the network's business
                await mallory.network.request(
                    alice.peer_id, CHUNKS_PROTOCOL, ChunksRequest(list(hashes))
                )
        assert alice.network._scores[mallory.peer_id] <= -60


@trio_test
async def test_under_a_quota_what_nobody_keeps_makes_room(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((_alice, bob), published):
        first, second, third = published[1:4]
        bob.store.chunks.quota_bytes = 2 * SIZE + 40 * limits.KIB
        await bob.fetch.fetch([first.id])
        bob.store.pin(first.id, reason=Pin.HELD)
        await bob.fetch.fetch([second.id])
        await bob.fetch.fetch([third.id])
        assert bob.store.is_stored(first.id) and bob.store.is_stored(third.id)
        assert not bob.store.is_stored(second.id)
        bob.store.pin(third.id, reason=Pin.HELD)
        with pytest.raises(Refused, match="--disk") as full:
            await bob.fetch.fetch([second.id])
        assert full.value.code is ErrorCode.DISK_FULL
        assert bob.store.is_stored(first.id) and bob.store.is_stored(third.id)


@trio_test
async def test_a_fetch_does_not_push_out_what_it_has_been_asked_for(tmp_path: Path) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((_alice, bob), published):
        first, second, third = (one.id for one in published[1:4])
        bob.store.chunks.quota_bytes = 2 * SIZE + 40 * limits.KIB
        await bob.fetch.fetch([first, second])
        with pytest.raises(Refused, match="--disk") as full:
            await bob.fetch.fetch([first, second, third])
        assert full.value.code is ErrorCode.DISK_FULL
        assert bob.store.is_stored(first) and bob.store.is_stored(second)


@trio_test
async def test_what_is_served_does_not_stay_resident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm(tmp_path, "alice", "bob") as ((_, bob), published):
        let_go: list[Path] = []
        monkeypatch.setattr(limits, "read_bytes_resident_max", SIZE)
        monkeypatch.setattr("storage.store.let_pages_go", let_go.append)
        await bob.fetch.fetch([part.id for part in published[1:4]])
        assert 2 <= len(let_go) <= 3  # of 3 times SIZE, as the chunks come
