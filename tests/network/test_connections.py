"""Connections themselves: who takes the places, what is remembered, and which one is dead."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import TProtocol
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service.context import background_trio_service
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from blyan_node.network.errors import PeerGone
from blyan_node.network.interface import PeerDown, PeerUp
from blyan_node.network.muxer import GuardedYamux
from blyan_node.network.network import Network
from blyan_node.testing.echo_node import PROTOCOL, Echo, build
from blyan_node.testing.processes import echo_process, peer_of, wait_for
from blyan_node.testing.trio_tests import trio_test
from blyan_node.testing.virtual_time import virtual_time_test
from protocols.ids import PeerId
from protocols.limits import connections_per_peer_max, ping_every_s, pings_unanswered_max


@asynccontextmanager
async def stranger(victim: Network, keys: KeyPair | None = None) -> AsyncIterator[IHost]:
    """A stock host with a connection to the victim; it never says hello."""
    keys = keys or create_new_key_pair()
    noise = NoiseTransport(keys, noise_privkey=create_noise_key().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE: noise})
    async with background_trio_service(host.get_network()):
        try:
            await host.connect(info_from_p2p_addr(Multiaddr(victim.addrs[0])))
            yield host
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                for conn in host.get_network().get_connections():
                    assert isinstance(conn.muxed_conn, Yamux)
                    await conn.muxed_conn.secured_conn.close()


@asynccontextmanager
async def running(net: Network) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        await nursery.start(net.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def until(true: Any) -> None:
    with trio.fail_after(8):
        while not true():
            await trio.sleep(0.05)


@trio_test
async def test_one_peer_cannot_take_all_places() -> None:
    alice, keys = build(1), create_new_key_pair()
    async with running(alice), trio.open_nursery() as nursery:
        for _ in range(connections_per_peer_max + 3):
            nursery.start_soon(_come_and_stay, alice, keys)
        await until(lambda: len(alice._swarm.get_connections()) >= connections_per_peer_max)
        await trio.sleep(1)
        assert len(alice._swarm.get_connections()) == connections_per_peer_max
        nursery.cancel_scope.cancel()


async def _come_and_stay(victim: Network, keys: KeyPair) -> None:
    try:
        async with stranger(victim, keys):
            await trio.sleep_forever()
    except Exception:  # the victim hangs up, in one way or another
        pass


@trio_test
async def test_who_says_nothing_keeps_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blyan_node.network.host.peers_max", 8)
    monkeypatch.setattr("blyan_node.network.host.handshakes_max", 4)
    alice = build(1)
    async with running(alice) as nursery:
        port = int(alice.addrs[0].split("/")[4])
        silent = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(20)]
        bob = build(2)
        await nursery.start(bob.run)
        with trio.fail_after(5):
            await bob.connect(alice.addrs[0])
        assert len(alice._swarm.handshakes) <= 4
        for stream in silent:
            await stream.aclose()


@trio_test
async def test_strangers_beyond_the_limit_make_room_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blyan_node.network.membership.strangers_max", 2)
    alice = build(1)
    async with running(alice) as nursery:
        bob = build(2, (alice.addrs[0],))
        await nursery.start(bob.run)
        await until(lambda: bob.peer_id in alice.peers)
        async with stranger(alice) as one, stranger(alice) as two, stranger(alice) as three:
            ids = [host.get_id() for host in (one, two, three)]
            await until(lambda: not alice._swarm.get_connections(ids[0]))
            assert all(alice._swarm.get_connections(i) for i in ids[1:])
            assert bob.peer_id in alice.peers and len(alice._members._strangers) == 2


@trio_test
async def test_who_is_gone_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blyan_node.network.network.forget_every_s", 0.5)
    alice = build(1)
    async with running(alice):
        gone: list[ID] = []
        for _ in range(4):
            async with stranger(alice) as host:
                gone.append(host.get_id())
                await until(lambda: gone[-1] in alice._swarm.peerstore.peer_ids())
                addrs = ["/ip4/192.0.2.7/tcp/1"]
                await alice._providers.met(PeerId(str(gone[-1])), addrs)
                assert gone[-1] in alice._providers.routing_peers()
        await until(lambda: not alice._swarm.get_connections())
        await until(lambda: not set(gone) & set(alice._swarm.peerstore.peer_ids()))
        assert not alice._swarm.auto_connector._recent_disconnects
        assert not alice._members._strangers


class Silent:
    """The wire under a muxer: what is written is kept, and what is read the test decides."""

    is_initiator = True

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = trio.Event()
        self.say, self._heard = trio.open_memory_channel[bytes](100)

    async def read(self, n: int | None = None) -> bytes:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, scope)
                data = await self._heard.receive()
                nursery.cancel_scope.cancel()
            return data
        raise trio.ClosedResourceError

    async def _end(self, scope: trio.CancelScope) -> None:
        await self.closed.wait()
        scope.cancel()

    async def write(self, data: bytes) -> None:
        self.written.append(data)

    async def close(self) -> None:
        self.closed.set()

    def get_remote_address(self) -> None:
        return None


PONG = b"\0\2\0\2\0\0\0\0\0\0\0\1"
DEAD_AFTER_S = (pings_unanswered_max + 1) * ping_every_s


@virtual_time_test
async def test_a_connection_that_answers_no_ping_ends() -> None:
    wire = Silent()
    muxed = GuardedYamux(cast(Any, wire), ID(b"bob"), is_initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxed.start)
        with trio.fail_after(DEAD_AFTER_S):
            await wire.closed.wait()
            await muxed.event_closed.wait()
    assert len(wire.written) == pings_unanswered_max


@virtual_time_test
async def test_any_sign_of_life_keeps_a_connection() -> None:
    wire = Silent()
    muxed = GuardedYamux(cast(Any, wire), ID(b"bob"), is_initiator=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(muxed.start)
        for _ in range(20):
            await trio.sleep(ping_every_s * pings_unanswered_max - 0.1)
            await wire.say.send(PONG)
        assert not wire.closed.is_set()
        await muxed.abort()


@pytest.mark.slow
@trio_test
async def test_other_software_is_answered_and_its_connection_stays() -> None:
    alice = build(1)
    async with running(alice), stranger(alice) as host:
        victim = ID.from_base58(alice.peer_id)
        await trio.sleep(DEAD_AFTER_S + 2 * ping_every_s)  # it answers pings as the standard says
        (conn,) = alice._swarm.get_connections(host.get_id())
        assert not conn.is_closed
        ping = await host.new_stream(victim, [TProtocol("/ipfs/ping/1.0.0")])
        await ping.write(b"p" * 32)
        assert await ping.read(32) == b"p" * 32
        identify = await host.new_stream(victim, [TProtocol("/ipfs/id/1.0.0")])
        assert b"/meshsub/1.1.0" in await identify.read(8192)
        find = await host.new_stream(victim, [TProtocol("/ipfs/kad/1.0.0")])
        message = Message(type=Message.MessageType.FIND_NODE, key=victim.to_bytes())
        await find.write(encode_varint_prefixed(message.SerializeToString()))
        assert await find.read(8192)
        assert alice.counters.penalties == 0


@pytest.mark.slow
@trio_test
async def test_a_process_that_hangs_is_gone_for_who_waits_for_it_and_comes_back() -> None:
    alice = build(1)
    events = alice.peer_events()
    async with running(alice) as nursery:
        with echo_process(2, alice.addrs[0]) as (bob, addr):
            peer = peer_of(addr)
            with trio.fail_after(10):
                await wait_for(events, PeerUp, peer)
            assert await alice.request(peer, PROTOCOL, Echo(b"x")) == Echo(b"x")
            bob.send_signal(signal.SIGSTOP)
            gone = trio.Event()

            async def waits() -> None:
                with pytest.raises(PeerGone):
                    await alice.request(peer, PROTOCOL, Echo(b"x"), timeout_s=60)
                gone.set()

            nursery.start_soon(waits)
            with trio.fail_after(DEAD_AFTER_S + ping_every_s + 2):
                await gone.wait()
                await wait_for(events, PeerDown, peer)
            bob.send_signal(signal.SIGCONT)
            with trio.fail_after(30):
                await wait_for(events, PeerUp, peer)
            assert await alice.request(peer, PROTOCOL, Echo(b"y")) == Echo(b"y")
