"""What passes is counted by protocol, and by peer while it is here; failures by their cause."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import msgspec
import pytest
import trio

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import NetworkConfig, PeerDown, PeerUp
from blyan_node.network.network import Network
from blyan_node.network.traffic import Ledger
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import NetworkId, PeerId, cid
from protocols.limits import peers_max
from protocols.signing import Identity
from protocols.wire import Messages

ASK, OTHER, GOSSIP = "/blyan/ask/1", "/blyan/other/1", "/meshsub/1.1.0"
MESSAGES = Messages(ASK)


class Ask(msgspec.Struct, frozen=True):
    text: str


MESSAGES.register(1, Ask, bytes_max=200_000)


async def _answer(peer: PeerId, message: Ask) -> Ask:
    if message.text == "refuse":
        raise Refused(ErrorCode.BUSY, "busy", "a test")
    if message.text == "hang":
        await trio.sleep_forever()
    return message


def _node(number: int, *bootstrap: str) -> Network:
    config = NetworkConfig(
        network_id=NetworkId(cid(b"traffic")),
        network_name="traffic",
        role="main",
        version="1",
        profile="test",
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=bootstrap,
    )
    net = Network(Identity.from_seed(bytes([number]) * 32), config)
    net.handle(ASK, MESSAGES, _answer)
    net.handle(OTHER, MESSAGES, _answer)
    return net


@asynccontextmanager
async def _pair() -> AsyncIterator[tuple[Network, Network, trio.CancelScope]]:
    """Alice, bob, and what ends bob."""
    alice = _node(1)
    ends = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        bob = _node(2, alice.addrs[0])

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with ends:
                await bob.run(task_status=task_status)

        events = bob.peer_events()
        await nursery.start(run)
        assert isinstance(await events.receive(), PeerUp)
        yield alice, bob, ends
        nursery.cancel_scope.cancel()


@trio_test
async def test_both_sides_count_the_same_bytes_under_the_protocol_that_was_spoken() -> None:
    async with _pair() as (alice, bob, _):
        size = 100_000
        await bob.request(alice.peer_id, ASK, Ask("x" * size))
        asked, answered = bob.ledger.protocols[ASK], alice.ledger.protocols[ASK]
        assert (asked.requests_out, asked.requests_in) == (1, 0)
        assert (answered.requests_out, answered.requests_in) == (0, 1)
        assert size < asked.bytes_out == answered.bytes_in < size + 200
        assert size < asked.bytes_in == answered.bytes_out < size + 200
        other = bob.ledger.protocols[OTHER]
        assert (other.bytes_in, other.bytes_out, other.requests_out) == (0, 0, 0)
        of_alice = bob.ledger.peers[alice.peer_id]
        assert of_alice.bytes_out >= asked.bytes_out and of_alice.bytes_in >= asked.bytes_in
        total = sum(t.bytes_in for name, t in bob.ledger.protocols.items() if name != GOSSIP)
        assert total == bob.counters.bytes_in


@trio_test
async def test_gossip_is_counted_too() -> None:
    alice = _node(1)
    inbox = alice.subscribe("blocks", lambda peer, data: None, 10)
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        bob = _node(2, alice.addrs[0])
        events = bob.peer_events()
        await nursery.start(bob.run)
        assert isinstance(await events.receive(), PeerUp)
        while alice.ledger.protocol(GOSSIP).bytes_in == 0:  # bob's subscriptions are on their way
            await trio.lowlevel.checkpoint()
        before = alice.ledger.protocols[GOSSIP].bytes_in
        while not inbox.statistics().current_buffer_used:
            await bob.publish("blocks", b"y" * 5_000)
            await trio.lowlevel.checkpoint()
        assert alice.ledger.protocols[GOSSIP].bytes_in - before > 5_000
        assert bob.ledger.protocols[GOSSIP].bytes_out > 5_000
        assert alice.ledger.peers[bob.peer_id].bytes_in > 5_000
        nursery.cancel_scope.cancel()


@trio_test
async def test_failures_are_counted_by_their_cause() -> None:
    async with _pair() as (alice, bob, ends):
        failures = alice.ledger.protocols[ASK].failures
        with pytest.raises(PeerRefused):
            await alice.request(bob.peer_id, ASK, Ask("refuse"))
        with pytest.raises(RequestTimeout):
            await alice.request(bob.peer_id, ASK, Ask("hang"), timeout_s=0.1)
        assert failures == {"refused": 1, "timeout": 1}

        async def ask_until_gone() -> None:
            with pytest.raises(PeerGone):
                await alice.request(bob.peer_id, ASK, Ask("hang"))

        events = alice.peer_events()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_until_gone)
            while alice.ledger.protocols[ASK].requests_out < 3:
                await trio.lowlevel.checkpoint()
            ends.cancel()
        assert failures == {"refused": 1, "timeout": 1, "gone": 1}
        while not isinstance(await events.receive(), PeerDown):
            pass
        assert bob.peer_id not in alice.ledger.peers, "who left is no longer counted"


@trio_test
async def test_a_reply_that_makes_no_sense_is_malformed(monkeypatch: pytest.MonkeyPatch) -> None:
    short = Messages(ASK)
    short.register(1, Ask, bytes_max=200_000)
    monkeypatch.setattr(short, "encode", lambda message: MESSAGES.encode(message)[:-1])
    async with _pair() as (alice, bob, _):
        served = alice._exchange._served
        served[ASK] = replace(served[ASK], messages=short)
        with pytest.raises(RemoteProtocolError):
            await bob.request(alice.peer_id, ASK, Ask("x" * 100))
        assert bob.ledger.protocols[ASK].failures == {"malformed": 1}


def test_peers_that_come_and_go_leave_nothing() -> None:
    ledger = Ledger()
    for number in range(10 * peers_max):
        for traffic in ledger.meters(PeerId(str(number)), ASK):
            traffic.bytes_in += 1
    assert len(ledger.peers) == peers_max
    assert ledger.protocols[ASK].bytes_in == 10 * peers_max
