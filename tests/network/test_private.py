"""Private swarms: who has no key or another one is told apart from a friend at the first bytes."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import nacl.secret
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from libp2p.custom_types import TProtocol

from blyan_node.network.doorkeeper import Doorkeeper
from blyan_node.network.errors import PeerGone
from blyan_node.network.interface import NetworkConfig
from blyan_node.network.network import Network
from blyan_node.network.private import (
    DIALLED,
    GREETING,
    NO_LIBP2P,
    NONCE_BYTES,
    WITHOUT_KEY,
    WRONG_KEY,
    xsalsa20,
)
from blyan_node.testing.echo_node import MESSAGES, NETWORK, PROTOCOL, Echo, echo
from blyan_node.testing.trio_tests import trio_test
from protocols.ids import PeerId
from protocols.limits import handshakes_max, turned_away_said_every_s
from protocols.signing import Identity

OURS, OTHER = bytes([1]) * 32, bytes([2]) * 32
ATTEMPTS, AT_ONCE = 2_000, 50
CONFIG = NetworkConfig(
    NETWORK, "echo", role="gpu", version="test", profile="test", listen=("/ip4/127.0.0.1/tcp/0",)
)


def build(seed: int, psk: bytes | None, allowed: frozenset[PeerId] | None = None) -> Network:
    """A node that answers echoes."""
    config = replace(CONFIG, seed=seed, psk=psk, allowed_peers=allowed)
    network = Network(Identity.from_seed(bytes([seed]) * 32), config)
    network.handle(PROTOCOL, MESSAGES, echo)
    return network


def name(seed: int) -> PeerId:
    return Identity.from_seed(bytes([seed]) * 32).peer_id


@asynccontextmanager
async def running(*networks: Network) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        for network in networks:
            await nursery.start(network.run)
        yield
        nursery.cancel_scope.cancel()


def lines(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=24, max_size=24), st.data())
def test_the_cipher_is_that_of_libsodium(key: bytes, nonce: bytes, data: st.DataObject) -> None:
    """Its secretbox is XSalsa20 too: behind 32 bytes of the stream, and 16 of the tag."""
    plain = data.draw(st.binary(max_size=300))
    box = nacl.secret.SecretBox(key).encrypt(plain, nonce).ciphertext
    stream = xsalsa20(key, nonce)
    cut = data.draw(st.integers(0, len(plain)))
    stream.encrypt(bytes(32))
    assert stream.encrypt(plain[:cut]) + stream.encrypt(plain[cut:]) == box[16:]


def test_those_who_share_a_key_talk_and_the_wire_shows_nothing() -> None:
    @trio_test
    async def story() -> None:
        alice, bob = build(1, OURS), build(2, OURS)
        async with running(alice, bob):
            peer = await bob.connect(alice.addrs[0])
            for size in (0, 1, 100_000):
                assert len((await bob.request(peer, PROTOCOL, Echo(bytes(size)))).data) == size
            stream = await dial(alice)
            await stream.send_all(os.urandom(NONCE_BYTES))
            answer = await everything(stream, NONCE_BYTES + len(GREETING))
            assert b"multistream" not in answer
            cipher = xsalsa20(OURS, answer[:NONCE_BYTES])
            assert cipher.encrypt(answer[NONCE_BYTES:])[: len(GREETING)] == GREETING
            await stream.aclose()

    story()


@pytest.mark.parametrize(
    ("listener", "dialler", "said"),
    [(OURS, OTHER, WRONG_KEY), (OURS, None, WITHOUT_KEY), (None, OURS, NO_LIBP2P)],
)
def test_an_outsider_is_refused_in_one_line_on_each_side(
    listener: bytes | None, dialler: bytes | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    @trio_test
    async def story() -> None:
        alice, mallory = build(1, listener), build(2, dialler)
        async with running(alice, mallory):
            with trio.fail_after(20):
                for _ in range(3):
                    with pytest.raises(PeerGone, match=DIALLED[dialler is not None][:30]):
                        await mallory.connect(alice.addrs[0])
            assert not alice.peers and not mallory.peers

    with caplog.at_level(logging.INFO, "blyan.network"):
        story()
    assert lines(caplog, "turned away") == [f"turned away 127.0.0.1: {said}"]


@pytest.mark.slow
def test_two_thousand_attempts_leave_no_task_behind(caplog: pytest.LogCaptureFixture) -> None:
    """Batches of strangers, each of whom is shown the door before the next batch comes."""

    @trio_test
    async def story() -> None:
        alice, bob = build(1, OURS), build(2, OURS)
        async with running(alice, bob):
            peer = await bob.connect(alice.addrs[0])
            await batch(alice, 0)
            before = trio.lowlevel.current_statistics().tasks_living
            for start in range(AT_ONCE, ATTEMPTS, AT_ONCE):
                await batch(alice, start)
            with trio.fail_after(10):
                while alice._swarm.handshakes:
                    await trio.lowlevel.checkpoint()
            assert alice._swarm.doorkeeper.turned_away == ATTEMPTS
            assert trio.lowlevel.current_statistics().tasks_living <= before + AT_ONCE
            assert (await bob.request(peer, PROTOCOL, Echo(b"still"))).data == b"still"
            assert list(alice.peers) == [bob.peer_id]

    with caplog.at_level(logging.INFO, "blyan.network"):
        story()
    assert 2 <= len(lines(caplog, "turned away")) <= 6
    assert len(caplog.records) < 30


async def batch(victim: Network, start: int) -> None:
    """One of three strangers each: with another key, with none, with noise."""
    async with trio.open_nursery() as nursery:
        for number in range(start, start + AT_ONCE):
            nursery.start_soon(attempt, victim, number % 3)


async def attempt(victim: Network, kind: int) -> None:
    nonce = bytes([255]) * NONCE_BYTES
    first = [nonce + xsalsa20(OTHER, nonce).encrypt(GREETING), GREETING, os.urandom(64)][kind]
    stream = await dial(victim)
    try:
        await stream.send_all(first)
        await everything(stream, 1 << 20)
    except trio.BrokenResourceError:
        pass  # it was shown the door with bytes of ours unread
    await stream.aclose()


async def dial(victim: Network) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", int(victim.addrs[0].split("/")[4]))


async def everything(stream: trio.SocketStream, size: int) -> bytes:
    """What comes until the end, `size` bytes at most."""
    data = b""
    while len(data) < size and (part := await stream.receive_some()):
        data += part
    return data


def test_a_reason_is_said_once_a_minute_with_the_number_of_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keeper = Doorkeeper(logging.WARNING)
    with caplog.at_level(logging.INFO, "blyan.network"):
        for second in range(turned_away_said_every_s + 1):
            keeper.turn_away("192.0.2.7", WRONG_KEY, 1000.0 + second)
    once, again = lines(caplog, "turned away")
    assert once.endswith(WRONG_KEY)
    assert again.endswith(f"({turned_away_said_every_s - 1} more since the last such line)")


def test_a_peer_that_is_not_allowed_is_told_so_on_hello(caplog: pytest.LogCaptureFixture) -> None:
    @trio_test
    async def story() -> None:
        alice, bob, carol = build(1, OURS, frozenset([name(2)])), build(2, OURS), build(3, OURS)
        async with running(alice, bob, carol):
            await bob.connect(alice.addrs[0])
            with pytest.raises(PeerGone):
                await carol.connect(alice.addrs[0])
            with trio.fail_after(10):
                while alice.peer_id in carol._members.connections():
                    await carol._members.changed.wait()
            assert list(alice.peers) == [name(2)] and not carol.peers
            alice.set_allowed(frozenset([name(3)]))
            with trio.fail_after(10):
                while alice.peers:
                    await alice._members.changed.wait()
            await carol.connect(alice.addrs[0])
            assert list(alice.peers) == [name(3)]

    with caplog.at_level(logging.INFO, "blyan.network"):
        story()
    assert len(lines(caplog, f"{name(3)} wants to take part and is not among allowed_peers")) == 1
    assert len(lines(caplog, f"{name(1)} refuses us: this network lets in only the peers")) == 1


def test_who_is_not_allowed_gets_nothing_but_hello() -> None:
    """No gossip goes out to it, and no other protocol is answered."""

    @trio_test
    async def story() -> None:
        alice, carol = build(1, None, frozenset()), build(3, None)
        async with running(alice, carol):
            carol._members.around.greeting.begin = forget  # type: ignore[method-assign, assignment]
            with trio.move_on_after(2):
                await carol.connect(alice.addrs[0])
            host, peer = carol._host, alice._host.get_id()
            for protocol in ("/meshsub/1.1.0", "/ipfs/id/1.0.0", "/ipfs/kad/1.0.0", PROTOCOL):
                with pytest.raises(Exception, match=r"protocol|stream"):  # py-libp2p: no base
                    await host.new_stream(peer, [TProtocol(protocol)])
            stream = await host.new_stream(peer, [TProtocol("/blyan/hello/1")])
            await stream.reset()
            assert carol._host.get_id() not in alice._gossip._pubsub.peers

    story()


def test_who_is_not_allowed_and_says_nothing_does_not_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blyan_node.network.membership.hello_s_max", 0.5)

    @trio_test
    async def story() -> None:
        alice, carol = build(1, None, frozenset()), build(3, None)
        async with running(alice, carol):
            carol._members.around.greeting.begin = forget  # type: ignore[method-assign, assignment]
            with contextlib.suppress(PeerGone):
                await carol.connect(alice.addrs[0])
            with trio.fail_after(10):
                while alice._members.connections():
                    await alice._members.changed.wait()

    story()


def test_half_a_nonce_and_then_nothing_keeps_nobody_out() -> None:
    @trio_test
    async def story() -> None:
        alice, bob = build(1, OURS), build(2, OURS)
        async with running(alice, bob), contextlib.AsyncExitStack() as held:
            for _ in range(handshakes_max + 20):
                stream = await held.enter_async_context(await dial(alice))
                await stream.send_all(os.urandom(NONCE_BYTES // 2))
            await bob.connect(alice.addrs[0])
            assert len(alice._swarm.handshakes) <= handshakes_max
            assert list(alice.peers) == [bob.peer_id]

    story()


async def forget(_: PeerId) -> None:
    """A dialler that never says hello."""
    await trio.sleep_forever()
