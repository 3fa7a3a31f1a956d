"""Two nodes that cannot dial each other talk through a third, which can only end it."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from libp2p.abc import INetStream
from libp2p.peer.id import ID

from blyan_node.network import relay
from blyan_node.network.errors import PeerGone
from blyan_node.network.interface import NetworkConfig
from blyan_node.network.network import Network
from blyan_node.network.private import GREETING
from blyan_node.network.relay import HOP, STOP, Verdict
from blyan_node.testing.echo_node import MESSAGES, NETWORK, PROTOCOL, Echo, echo
from blyan_node.testing.trio_tests import trio_test
from blyan_node.testing.virtual_time import virtual_time_test
from protocols.ids import PeerId
from protocols.limits import (
    MIB,
    relay_all_bytes_per_s_max,
    relay_bytes_per_s_max,
    relay_circuits_max,
    relay_circuits_per_peer_max,
)
from protocols.signing import Identity

CLOSED = "/ip4/127.0.0.1/tcp/9"
CONFIG = NetworkConfig(
    NETWORK, "echo", role="gpu", version="test", profile="test", listen=("/ip4/127.0.0.1/tcp/0",)
)


def build(seed: int, **options: object) -> Network:
    config = replace(CONFIG, seed=seed, **options)  # type: ignore[arg-type]
    network = Network(Identity.from_seed(bytes([seed]) * 32), config)
    network.handle(PROTOCOL, MESSAGES, echo)
    return network


@asynccontextmanager
async def behind_doors(psk: bytes | None = None) -> AsyncIterator[tuple[Network, ...]]:
    """Alice, whom everybody can dial; bob and carol, whom nobody can; all three connected."""
    alice = build(1, psk=psk)
    bob, carol = (build(seed, psk=psk, announce=(CLOSED,)) for seed in (2, 3))
    async with trio.open_nursery() as nursery:
        for node in (alice, bob, carol):
            await nursery.start(node.run)
        for node in (bob, carol):
            await node.connect(alice.addrs[0])
        for node in (alice, bob, carol):
            await until(node, 2)
        yield alice, bob, carol
        nursery.cancel_scope.cancel()


async def until(node: Network, peers: int) -> None:
    with trio.fail_after(30):
        while len(node.peers) != peers:
            await node._members.changed.wait()


@pytest.mark.parametrize("psk", [None, bytes(32)])
def test_two_whom_nobody_can_dial_find_and_ask_each_other(psk: bytes | None) -> None:
    @trio_test
    async def story() -> None:
        async with behind_doors(psk) as (alice, bob, carol):
            for size in (1, 2_000_000):
                reply = await bob.request(carol.peer_id, PROTOCOL, Echo(bytes(size)))
                assert len(reply.data) == size
            await carol.request(bob.peer_id, PROTOCOL, Echo(b"and back"))
            assert alice._relay._circuits.total() >= 1
            assert bob._relay._circuits.total() == carol._relay._circuits.total() == 0

    story()


@trio_test
async def test_a_circuit_ends_with_the_node_in_between() -> None:
    async with behind_doors() as (alice, bob, carol):
        alice._members.around.swarm.events.admits = lambda peer: False  # type: ignore[method-assign]
        await alice._swarm.abort_all()
        await until(bob, 0)
        await until(carol, 0)
        with trio.fail_after(10):
            while alice._relay._circuits:
                await trio.lowlevel.checkpoint()


@trio_test
async def test_who_cannot_be_relayed_is_said() -> None:
    async with behind_doors() as (alice, bob, carol):
        stranger = Identity.from_seed(bytes(32)).peer_id
        assert "not a peer" in str(await bob._relay.dial(stranger))
        with pytest.raises(PeerGone, match="refused"):  # of the address that it was given
            await bob.connect(f"{CLOSED}/p2p/{stranger}")
        for circuits in (
            {PeerId("other"): relay_circuits_max},
            {bob.peer_id: relay_circuits_per_peer_max},
        ):
            alice._relay._circuits.clear()
            alice._relay._circuits.update(circuits)
            assert await bob._relay._dial_through(alice.peer_id, carol.peer_id) is Verdict.BUSY
        alice._relay._circuits.clear()
        carol._members.allowed = frozenset([alice.peer_id])
        found = await bob._relay._dial_through(alice.peer_id, carol.peer_id)
        assert found is Verdict.REFUSED
        answer_as_target(bob, Verdict.OPEN)
        assert (await ask(alice, bob, bob))[0] is Verdict.REFUSED


@trio_test
async def test_a_circuit_never_leads_through_another() -> None:
    """Dave is a peer of carol alone; bob, who has carol through alice, does not get to him."""
    async with behind_doors() as (_, bob, carol), trio.open_nursery() as nursery:
        dave = build(4, announce=(CLOSED,), allowed_peers=frozenset([bob.peer_id, carol.peer_id]))
        await nursery.start(dave.run)
        port = next(iter(carol._swarm.listeners.values())).get_addrs()[0]
        await dave.connect(f"{port}/p2p/{carol.peer_id}")
        found = await bob._relay._dial_through(carol.peer_id, dave.peer_id)
        assert found is Verdict.REFUSED
        found = await dave._relay._dial_through(carol.peer_id, bob.peer_id)
        assert found is Verdict.NOT_A_PEER
        assert dave.peer_id not in bob.peers
        nursery.cancel_scope.cancel()


async def ask(via: Network, asker: Network, target: Network) -> tuple[Verdict, INetStream]:
    """A bare circuit, without a connection in it."""
    stream = await asker._host.new_stream(ID.from_base58(via.peer_id), [HOP])
    await stream.write(relay._name(target.peer_id))
    return await relay._verdict(stream), stream


def answer_as_target(node: Network, verdict: int) -> None:
    """The target says `verdict`, and nothing after it."""

    async def come_in(stream: INetStream) -> None:
        await stream.write(bytes([verdict]))
        with contextlib.suppress(Exception):  # py-libp2p: no base; the other end resets it
            await stream.read(1)

    node._host.set_stream_handler(STOP, come_in)


@trio_test
async def test_who_asks_for_many_circuits_at_once_gets_no_more_than_one_after_the_other() -> None:
    async with behind_doors() as (alice, bob, carol):
        alice._relay._circuits.clear()
        answer_as_target(carol, Verdict.OPEN)
        found: list[Verdict] = []

        async def one() -> None:
            verdict, _ = await ask(alice, bob, carol)
            found.append(verdict)

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(3 * relay_circuits_per_peer_max):
                    nursery.start_soon(one)
        assert found.count(Verdict.OPEN) == relay_circuits_per_peer_max
        assert found.count(Verdict.BUSY) == 2 * relay_circuits_per_peer_max


@trio_test
async def test_what_a_target_does_wrong_costs_the_asker_nothing() -> None:
    async with behind_doors() as (alice, bob, carol):
        answer_as_target(carol, 99)
        verdict, _ = await ask(alice, bob, carol)
        assert verdict is Verdict.NOT_A_PEER
        assert alice.peers[bob.peer_id].score == 0 > alice.peers[carol.peer_id].score


@pytest.mark.parametrize(
    "data", [b"no libp2p" * 9, GREETING + bytes([7]) + b"/noise\n" + bytes([0, 32]) + bytes(99)]
)
def test_what_comes_out_of_a_circuit_costs_the_node_in_between_nothing(data: bytes) -> None:
    @trio_test
    async def story() -> None:
        async with behind_doors() as (alice, bob, carol):
            verdict, stream = await ask(alice, bob, carol)
            assert verdict is Verdict.OPEN
            await stream.write(data)
            with trio.fail_after(15), contextlib.suppress(Exception):  # reset: py-libp2p, no base
                while await stream.read(1000):
                    pass
            assert carol.peers[alice.peer_id].score == 0 and carol.counters.penalties == 0

    story()


@trio_test
async def test_a_circuit_on_which_nothing_passes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "relay_silence_s_max", 0.3)
    async with behind_doors() as (alice, bob, carol):
        answer_as_target(carol, Verdict.OPEN)
        before = alice._relay._circuits.total()
        verdict, _ = await ask(alice, bob, carol)
        assert verdict is Verdict.OPEN
        with trio.fail_after(10):
            while alice._relay._circuits.total() > before:
                await trio.sleep(0.05)


@virtual_time_test
async def test_circuits_share_what_a_node_passes_on() -> None:
    one = build(1)._relay
    assert one._price_s(MIB) == MIB / relay_bytes_per_s_max
    await trio.sleep(1)
    prices = [one._price_s(MIB) for _ in range(64)]
    assert prices[-1] == pytest.approx(64 * MIB / relay_all_bytes_per_s_max)
