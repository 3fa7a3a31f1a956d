"""Nodes that gossip, catch up and agree, over the in-process network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from blyan_node.services.chain import ReleaseAccepted, UpdateAccepted
from blyan_node.testing.blocks import NOW_MS, Author, Made
from blyan_node.testing.chain_nodes import ChainNode, running
from blyan_node.testing.network import NETWORK, Fabric
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.dag.heads import heads_of
from protocols.errors import ErrorCode, LocalProtocolError, Refused, RemoteProtocolError
from protocols.ids import cid_text
from protocols.sync.messages import (
    SYNC_PROTOCOL,
    Blocks,
    BlocksRequest,
    LogPage,
    LogRequest,
)

EXPERTS = ["embed", *(f"layer0.expert{i}" for i in range(6))]


def agree(*nodes: ChainNode) -> None:
    first, *others = nodes
    for node in others:
        assert node.log == first.log
        assert set(node.chain.models()) == set(first.chain.models())
        for model in node.chain.models():
            assert node.chain.root(model) == first.chain.root(model)
            whole = heads_of(model, node.store)
            assert whole is not None and whole.heads == dict(node.chain.heads(model))
            assert node.chain.heads_and_forks(model) == first.chain.heads_and_forks(model)


@trio_test
async def test_a_publish_reaches_everybody_through_gossip(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, bob, carol = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob", "carol"))
    async with running(alice, bob, carol):
        events = bob.chain.events()
        published = alice.author.publish(subjects=EXPERTS)
        await alice.publish(published)
        await bob.has(published)
        await carol.has(published)
        event = await events.receive()
        assert isinstance(event, ReleaseAccepted) and not event.ours
        assert {b.id for b in event.blocks} == {m.id for m in published}
        update = alice.author.update(published[2], b"better")
        await alice.publish([update])
        await carol.has([update])
        await bob.has([update])
        after = await events.receive()
        assert isinstance(after, UpdateAccepted) and after.root == alice.chain.root(event.model)
        agree(alice, bob, carol)
        assert not bob.store.is_stored(published[2].id)  # chunks stay with who wants them


@trio_test
async def test_nodes_that_were_cut_off_have_the_union_after_they_meet(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    async with running(alice, bob):
        fabric.partition([alice.network], [bob.network])
        hers = alice.author.publish("hers", EXPERTS)
        his = bob.author.publish("his", EXPERTS)
        await alice.publish(hers)
        await bob.publish(his)
        fabric.heal()
        await alice.has(his)
        await bob.has(hers)
        agree(alice, bob)
        assert len(alice.chain.models()) == 2


@trio_test
async def test_a_fork_is_resolved_the_same_way_on_both_sides(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    published = alice.author.publish(subjects=EXPERTS)
    one = alice.author.update(published[2], b"one")
    two = alice.author.update(published[2], b"two")
    later = alice.author.update(two, b"three")
    async with running(alice, bob):
        await alice.publish(published)
        await bob.has(published)
        fabric.partition([alice.network], [bob.network])
        await alice.publish([one])
        rows = [(m.manifest_id, m.manifest_bytes) for m in (two, later)]
        await bob.chain.submit([two.block, later.block], rows, alice.peer_id)
        fabric.heal()
        await alice.has([one, two, later])
        await bob.has([one, two, later])
        agree(alice, bob)
        (fork,) = alice.chain.forks(published[0].id)
        assert fork.chosen == min(one.id, two.id)


@trio_test
async def test_a_late_joiner_catches_up_on_all_of_it(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, bob, carol = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob", "carol"))
    subjects = [f"layer{i}.expert{j}" for i in range(20) for j in range(15)]
    published = alice.author.publish(subjects=subjects)
    updates: list[Made] = [alice.author.update(published[1], b"0")]
    for i in range(1, 150):
        updates.append(alice.author.update(updates[-1], str(i).encode()))
    async with running(alice, bob) as nursery:
        await alice.publish([*published, *updates])
        await bob.has([*published, *updates])
        await nursery.start(carol.run)
        await carol.has([*published, *updates])
        agree(alice, bob, carol)
        for peer in (alice, bob):
            while carol.store.cursor(peer.peer_id, peer.store.log_id) < len(peer.log):
                await trio.sleep(0)
        while carol.sync.syncing() is not None:
            await trio.sleep(0)
        asked = alice.network.counters.requests_served, bob.network.counters.requests_served
        assert min(asked) > 1


@trio_test
async def test_a_walk_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    first = alice.author.publish("first", EXPERTS)
    second = alice.author.publish("second", EXPERTS)
    async with running(alice) as nursery:
        await alice.publish(first)
        await nursery.start(bob.run)
        await bob.has(first)
        while bob.store.cursor(alice.peer_id, alice.store.log_id) < len(first):
            await trio.sleep(0)
        bob.network.kill()
        await alice.publish(second)
        served = alice.network.counters.bytes_out
        again = ChainNode(fabric, "bob", tmp_path, store=bob.store)
        while bob.peer_id in alice.network.peers:
            await trio.sleep(0)
        await nursery.start(again.run)
        await again.has(second)
        agree(alice, again)
        assert alice.network.counters.bytes_out - served < served * 3


@trio_test
async def test_a_release_that_lists_what_nobody_has_waits_and_costs_nothing(
    tmp_path: Path,
) -> None:
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    model, embed, expert, release = alice.author.publish()
    async with running(alice, bob):
        for made in (model, embed, release):
            alice.store.put_chunks(made.chunks)
            rows = [(made.manifest_id, made.manifest_bytes)]
            alice.store.stage([made.block], rows)
        await bob.sync.pull(release.block, alice.peer_id)
        assert bob.log == set() and not bob.chain.models()
        assert bob.store.block(release.id) is not None
        await alice.publish([expert])
        await alice.chain.read_release(release.block, None)
        await bob.has([model, embed, expert, release])
        agree(alice, bob)


class Liar:
    """A peer that answers `/blyan/sync/1` from a script."""

    def __init__(self, node: ChainNode) -> None:
        self.node = node
        self.pages: list[LogPage] = []
        self.blocks: dict[bytes, bytes] = {}
        node.sync._answer = self.answer  # type: ignore[method-assign, assignment]
        node.network.calls.handlers[SYNC_PROTOCOL] = (
            node.network.calls.handlers[SYNC_PROTOCOL][0],
            self.answer,
        )

    async def answer(self, peer: object, message: object) -> object:
        if isinstance(message, LogRequest):
            return self.pages.pop(0) if len(self.pages) > 1 else self.pages[0]
        assert isinstance(message, BlocksRequest)
        found = [self.blocks[id] for id in message.ids if id in self.blocks]
        return Blocks(found, [id for id in message.ids if id not in self.blocks])


@trio_test
async def test_bad_blocks_in_a_log_cost_the_peer_and_not_the_node(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, bob, mallory = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob", "mallory"))
    published = alice.author.publish()
    forged = Author("alice", NETWORK).model("forged").block
    bad = forged.encode()[:-1] + b"\0"
    liar = Liar(mallory)
    liar.pages = [LogPage(bytes(16), [], 0, 1), LogPage(bytes(16), [forged.id], 1, 1)]
    liar.blocks = {bytes(forged.id): bad}
    async with running(mallory, bob, alice):
        await alice.publish(published)
        await bob.has(published)
        while not bob.network._scores.get(mallory.peer_id):
            await trio.sleep(0)
        assert bob.store.block(forged.id) is None
        assert not bob.network._scores.get(alice.peer_id)


class Endless(Liar):
    """A log without an end: `pages` is what it says over and over."""

    async def answer(self, peer: object, message: object) -> object:
        self.asked += 1
        return self.page(message) if isinstance(message, LogRequest) else Blocks([], message.ids)

    asked = 0
    page: Callable[[LogRequest], LogPage]


@pytest.mark.parametrize("trick", ["the same blocks", "another name", "shorter and longer"])
@trio_test
async def test_a_log_without_an_end_costs_the_peer(tmp_path: Path, trick: str) -> None:
    fabric = Fabric()
    alice, bob, mallory = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob", "mallory"))
    published = alice.author.publish()
    ids = [bytes(made.id) for made in published]
    liar = Endless(mallory)

    def same(asked: LogRequest) -> LogPage:
        named = ids if asked.limit else []
        return LogPage(bytes(16), named, asked.after + len(named), 2**40)

    def renamed(asked: LogRequest) -> LogPage:
        return LogPage(liar.asked.to_bytes(16, "big"), [], asked.after, 1)

    def shorter(asked: LogRequest) -> LogPage:
        if asked.after:
            return LogPage(bytes(16), [], 0, 1)
        return LogPage(bytes(16), ids[:2] if asked.limit else [], 2, 9)

    liar.page = {"the same blocks": same, "another name": renamed}.get(trick, shorter)
    async with running(alice, bob, mallory):
        await alice.publish(published)
        await bob.has(published)
        while not bob.network._scores.get(mallory.peer_id):
            bob.sync.poke(mallory.peer_id)
            await trio.sleep(0)
        assert not bob.network._scores.get(alice.peer_id)


@trio_test
async def test_what_was_dropped_behind_the_cursor_is_fetched_again(tmp_path: Path) -> None:
    """Staged blocks go when there are too many; the cursor has passed them by then."""
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    published = alice.author.publish(subjects=EXPERTS)
    await alice.publish(published)
    bob.store.set_cursor(alice.peer_id, alice.store.log_id, len(published) - 1)
    async with running(alice, bob):
        await bob.has(published)
        agree(alice, bob)


@trio_test
async def test_a_clock_that_is_set_back_ends_nobody(tmp_path: Path) -> None:
    """A block that was fit to spread when it was heard can lie in the future afterwards."""
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    clock = bob.chain.clock_ms
    async with running(alice, bob):
        published = alice.author.publish()
        await alice.publish(published)
        await bob.has(published)
        fabric.partition([alice.network], [bob.network])
        update = alice.author.update(published[1], b"new")
        ((validate, heard),) = bob.network._topics["blocks"]
        validate(alice.peer_id, update.block.encode())
        heard.put((alice.peer_id, update.block.encode()))
        bob.chain.clock_ms = lambda: 0
        await wait_all_tasks_blocked()
        bob.chain.clock_ms = clock
        fabric.heal()
        await alice.publish([update])
        await bob.has([update])


@trio_test
async def test_an_honest_peer_whose_clock_is_ahead_keeps_its_score(tmp_path: Path) -> None:
    """What it passes on is refused as long as it is early here, by gossip and by its log."""
    fabric = Fabric()
    alice, bob = (ChainNode(fabric, n, tmp_path) for n in ("alice", "bob"))
    clock = bob.chain.clock_ms
    bob.chain.clock_ms = lambda: NOW_MS - limits.clock_drift_ms_max - 60_000
    async with running(alice, bob):
        published = alice.author.publish()
        await alice.publish(published)
        while not bob.network.counters.gossip_refused:
            await trio.sleep(0)
        for _ in range(8):  # more than a ban takes
            bob.sync.poke(alice.peer_id)
            await trio.sleep(0.05)
        assert not bob.network._scores.get(alice.peer_id) and not bob.log
        bob.chain.clock_ms = clock
        bob.sync.poke(alice.peer_id)
        await bob.has(published)


@trio_test
async def test_gossip_of_junk_costs_its_sender(tmp_path: Path) -> None:
    fabric = Fabric()
    alice, mallory = (ChainNode(fabric, n, tmp_path) for n in ("alice", "mallory"))
    async with running(alice, mallory):
        staged = mallory.author.publish()[1]
        for junk in (b"", b"junk", b"\x92" * 1000, staged.block.encode()):
            await mallory.network.publish("blocks", junk)
        while alice.network.counters.gossip_refused < 4:
            await trio.sleep(0)
        assert alice.network._scores[mallory.peer_id] < 0
        await alice.publish(alice.author.publish())
        assert len(alice.log) == 4


@trio_test
async def test_our_own_bad_blocks_are_refused_to_our_face(tmp_path: Path) -> None:
    alice = ChainNode(Fabric(), "alice", tmp_path)
    published = alice.author.publish()
    with pytest.raises(LocalProtocolError, match="waits for"):
        await alice.publish(published[1:2])
    await alice.publish(published)
    with pytest.raises(Refused, match="not the model's"):
        await alice.publish([Author("mallory", NETWORK).update(published[1], b"x")])
    with pytest.raises(RemoteProtocolError, match="another network"):
        await alice.publish(Author("alice").publish("elsewhere"))


@trio_test
async def test_models_are_found_by_name_and_by_id(tmp_path: Path) -> None:
    alice = ChainNode(Fabric(), "alice", tmp_path)
    bob = Author("bob", NETWORK)
    await alice.publish(alice.author.publish("tiny"))
    (model,) = alice.chain.models().values()
    assert alice.chain.find_model("tiny") == model
    assert alice.chain.find_model(cid_text(model.id)) == model
    await alice.chain.submit([], [], None)
    other = bob.publish("tiny")
    await alice.publish(other)
    with pytest.raises(Refused, match="names 2 models") as ambiguous:
        alice.chain.find_model("tiny")
    assert ambiguous.value.code is ErrorCode.AMBIGUOUS
    assert alice.chain.find_model(f"tiny@{cid_text(other[0].id)}").id == other[0].id
    with pytest.raises(Refused, match="no model nothing") as unknown:
        alice.chain.find_model("nothing")
    assert unknown.value.code is ErrorCode.NOT_FOUND
