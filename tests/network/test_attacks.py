"""What strangers send: garbage on every protocol of a running node, which must go on answering.

The attackers are stock py-libp2p hosts and plain sockets; bob is an honest peer who asks before,
meanwhile and after.
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import TProtocol
from libp2p.host.exceptions import StreamFailure
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.pubsub.pb import rpc_pb2
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import Yamux
from libp2p.tools.anyio_service.context import background_trio_service
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from blyan_node.network.network import Network
from blyan_node.testing.echo_node import MESSAGES, PROTOCOL, Echo, build
from blyan_node.testing.trio_tests import trio_test
from protocols import hello
from protocols.channel.frames import HEADER, FrameKind
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import (
    MIB,
    dht_streams_per_peer_max,
    gossip_answer_bytes_max,
    gossip_ids_max,
    streams_per_peer_max,
    unread_bytes_per_peer_max,
)

PROTOCOLS = [
    "/blyan/hello/1",
    PROTOCOL,
    "/meshsub/1.1.0",
    "/ipfs/kad/1.0.0",
    "/ipfs/id/1.0.0",
    "/ipfs/id/push/1.0.0",
    "/ipfs/ping/1.0.0",
    "/blyan/reach/1",
    "/blyan/relay/1",
    "/blyan/relayed/1",
]


@asynccontextmanager
async def swarm() -> AsyncIterator[tuple[Network, Callable[[], Awaitable[None]]]]:
    """Alice, the victim, and a function by which bob checks that she answers."""
    alice = build(1)
    alice.subscribe("blocks", _refuse_bad, 10)
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        bob = build(2, tuple(alice.addrs))
        await nursery.start(bob.run)
        peer = await bob.connect(alice.addrs[0])

        async def check() -> None:
            for size in (1, 100_000):
                reply = await bob.request(peer, PROTOCOL, Echo(bytes(size)), timeout_s=10)
                assert len(reply.data) == size

        await check()
        yield alice, check
        await check()
        assert bob.peer_id in alice.peers and alice.peers[bob.peer_id].score == 0
        nursery.cancel_scope.cancel()


def _refuse_bad(peer: object, data: bytes) -> None:
    if data.startswith(b"bad"):
        raise RemoteProtocolError("test", "bad")


@asynccontextmanager
async def attacker(victim: Network, *, plaintext: bool = False) -> AsyncIterator[tuple[IHost, ID]]:
    keys = create_new_key_pair()
    noise = NoiseTransport(keys, noise_privkey=create_noise_key().private_key)
    offered = {PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)} if plaintext else {NOISE: noise}
    host = new_host(key_pair=keys, sec_opt=offered)
    async with background_trio_service(host.get_network()):
        info = info_from_p2p_addr(Multiaddr(victim.addrs[0]))
        try:
            await host.connect(info)
            yield host, info.peer_id
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                for conn in host.get_network().get_connections():
                    assert isinstance(conn.muxed_conn, Yamux)
                    await conn.muxed_conn.secured_conn.close()


async def throw(host: IHost, victim: ID, protocol: str, data: bytes, wait: float = 0.2) -> bytes:
    """Sends `data` on a new stream; what comes back."""
    answer = b""
    try:
        stream = await host.new_stream(victim, [TProtocol(protocol)])
        await stream.write(data)
        with trio.move_on_after(wait):
            while more := await stream.read(65536):
                answer += more
        await stream.reset()
    except Exception:  # whatever the victim does to us is fine
        pass
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_random_bytes_on_each_protocol(protocol: str) -> None:
    @trio_test
    async def story() -> None:
        chance = random.Random(protocol)
        async with swarm() as (alice, check):
            for _ in range(3):
                async with attacker(alice) as (host, victim), trio.open_nursery() as nursery:
                    for _ in range(6):
                        data = chance.randbytes(chance.choice([0, 1, 40, 3_000, 70_000]))
                        nursery.start_soon(throw, host, victim, protocol, data)
                        framed = encode_varint_prefixed(data)
                        nursery.start_soon(throw, host, victim, protocol, framed)
                await check()

    story()


@trio_test
async def test_garbage_in_our_channels_costs_score_and_in_the_end_the_connection() -> None:
    async with swarm() as (alice, _), attacker(alice) as (host, victim):
        for _ in range(6):
            await throw(host, victim, "/blyan/hello/1", b"\xff" * 100)
        assert not alice._members.admits(_peer_id(host))
        with trio.fail_after(5):
            while host.get_network().get_connections(victim):
                await trio.sleep(0.05)


@trio_test
async def test_a_peer_without_hello_may_not_ask() -> None:
    async with swarm() as (alice, _), attacker(alice) as (host, victim):
        data = MESSAGES.encode(Echo(b"let me in"))
        request = HEADER.pack(FrameKind.REQUEST, 1, len(data), len(data)) + data
        assert await throw(host, victim, PROTOCOL, request, 1) == b""
        assert _peer_id(host) not in alice.peers


@trio_test
async def test_a_hello_that_breaks_the_limits() -> None:
    async with swarm() as (alice, _), attacker(alice) as (host, victim):
        theirs = alice._greeting.ours()
        bad = hello.Hello(
            **{f: getattr(theirs, f) for f in theirs.__struct_fields__} | {"role": "x"}
        )
        data = hello.MESSAGES.encode(bad)
        await throw(
            host,
            victim,
            hello.PROTOCOL,
            HEADER.pack(FrameKind.REQUEST, 1, len(data), len(data)) + data,
        )
        assert alice.counters.penalties == 1 and _peer_id(host) not in alice.peers


def _peer_id(host: IHost) -> PeerId:
    return PeerId(str(host.get_id()))


@trio_test
async def test_gossip_with_false_signatures_foreign_topics_and_bad_content() -> None:
    async with swarm() as (alice, check), attacker(alice) as (host, victim):
        topic = next(iter(alice._gossip._subscribers))
        for i, message in enumerate(
            [
                rpc_pb2.Message(data=b"x", topicIDs=[topic], from_id=b"nobody", seqno=b"1"),
                rpc_pb2.Message(data=b"x", topicIDs=[topic] * 3, from_id=b"n", seqno=b"1"),
                rpc_pb2.Message(
                    data=b"x", topicIDs=[topic], from_id=host.get_id().to_bytes(), seqno=b"1" * 99
                ),
                rpc_pb2.Message(
                    data=b"x",
                    topicIDs=[topic],
                    from_id=host.get_id().to_bytes(),
                    seqno=b"1",
                    signature=b"s" * 64,
                    key=b"k" * 9000,
                ),
            ]
        ):
            rpc = rpc_pb2.RPC(publish=[message])
            rpc.control.graft.add(topicID="strange" * 50)
            rpc.control.prune.add(topicID=f"strange{i}", backoff=2**40)
            rpc.control.ihave.add(topicID=topic, messageIDs=[b"zz", b"", b"00" * 500])
            rpc.control.iwant.add(messageIDs=[b"not hex"])
            wire = encode_varint_prefixed(rpc.SerializeToString())
            await throw(host, victim, "/meshsub/1.1.0", wire)
        await check()
        assert alice.counters.penalties >= 3
        assert set(alice._gossip._router.back_off) <= set(alice._gossip._subscribers)


@trio_test
async def test_a_message_that_is_asked_for_many_times_is_sent_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with swarm() as (alice, _), attacker(alice) as (host, victim):
        topic, router = next(iter(alice._gossip._subscribers)), alice._gossip._router
        ids = []
        for i in range(100):
            message = rpc_pb2.Message(
                data=bytes(100_000), topicIDs=[topic], from_id=b"n" * 38, seqno=b"%08d" % i
            )
            router.mcache.put(message)
            ids.append((message.from_id + message.seqno).hex().encode())
        sent: list[int] = []
        monkeypatch.setattr(router, "send_rpc", lambda peer, rpc: sent.append(rpc.ByteSize()))
        for wanted in (ids[:1] * 10_000, ids):
            rpc = rpc_pb2.RPC()
            rpc.control.iwant.add(messageIDs=wanted)
            await throw(host, victim, "/meshsub/1.1.0", encode_varint_prefixed(bytes_of(rpc)))
        assert len(sent) == 2
        assert sent[0] < 110_000 and MIB < sent[1] < gossip_answer_bytes_max + 110_000
        await alice.publish("blocks", b"x")


@trio_test
async def test_rpcs_of_nothing_but_control_messages_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with swarm() as (alice, check), attacker(alice) as (host, victim):
        topic, router = next(iter(alice._gossip._subscribers)), alice._gossip._router
        grafts = rpc_pb2.RPC()
        for _ in range(10_000):
            grafts.control.graft.add(topicID=topic)
        await throw(host, victim, "/meshsub/1.1.0", encode_varint_prefixed(bytes_of(grafts)))
        assert alice.counters.penalties == 1
        asked: list[int] = []

        async def emit_iwant(ids: list[bytes], peer: object) -> None:
            asked.append(len(ids))

        monkeypatch.setattr(router, "emit_iwant", emit_iwant)
        ihave = rpc_pb2.RPC()
        ihave.control.ihave.add(topicID=topic, messageIDs=[b"%08x" % i for i in range(9_000)])
        ihave.control.idontwant.add(messageIDs=[b"%08x" % i for i in range(9_000)])
        await throw(host, victim, "/meshsub/1.1.0", encode_varint_prefixed(bytes_of(ihave)))
        assert asked == [gossip_ids_max]
        assert not any(router.dont_send_message_ids.values())
        assert alice.counters.penalties == 1
        await check()


def bytes_of(rpc: rpc_pb2.RPC) -> bytes:
    data: bytes = rpc.SerializeToString()
    return data


@trio_test
async def test_plaintext_is_not_spoken() -> None:
    async with swarm() as (alice, _):
        with pytest.raises(BaseException) as refused:  # libp2p's, in groups
            async with attacker(alice, plaintext=True):
                pass
        assert not isinstance(refused.value, AssertionError)


@trio_test
async def test_raw_tcp_garbage_and_half_open_connections() -> None:
    async with swarm() as (alice, check):
        chance = random.Random(5)
        port = int(alice.addrs[0].split("/")[4])
        held = []
        for case in range(60):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            if case % 3 == 0:
                await stream.send_all(chance.randbytes(chance.randrange(1, 5000)))
            elif case % 3 == 1:
                await stream.send_all(b"\x13/multistream/1.0.0\n\x07/noise\n")
                await stream.send_all(chance.randbytes(300))
            held.append(stream)
            if case % 2:
                await held.pop(0).aclose()
        await check()
        for stream in held:
            await stream.aclose()


@trio_test
async def test_streams_without_end_are_reset() -> None:
    async with swarm() as (alice, check), attacker(alice) as (host, victim):
        (conn,) = host.get_network().get_connections(victim)
        streams = [await conn.muxed_conn.open_stream() for _ in range(streams_per_peer_max + 40)]
        await trio.sleep(0.5)
        assert sum(1 for stream in streams if getattr(stream, "closed")) >= 40  # noqa: B009
        await check()


@trio_test
async def test_streams_that_are_held_open_do_not_keep_others_from_the_dht(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("blyan_node.network.providers.dht_stream_s_max", 1)
    async with swarm() as (alice, check), attacker(alice) as (host, victim):
        held = []
        for _ in range(14):
            try:
                stream = await host.new_stream(victim, [TProtocol("/ipfs/kad/1.0.0")])
                await stream.write(b"\x20")  # the length of a message that does not come
                held.append(stream)
            except StreamFailure:
                pass  # beyond what one peer may have open
        dht = alice._providers._dht
        with trio.fail_after(5):
            while dht._inbound_limiter.borrowed_tokens != dht_streams_per_peer_max:
                await trio.sleep(0.05)
            while dht._inbound_limiter.borrowed_tokens:
                await trio.sleep(0.05)
        assert not dht._serving
        await check()


@trio_test
async def test_a_peer_that_ignores_its_window_is_disconnected() -> None:
    async with swarm() as (alice, check), attacker(alice) as (host, victim):
        # identify is answered without reading, so what we send stays in the victim's buffer
        net_stream = await host.new_stream(victim, [TProtocol("/ipfs/id/1.0.0")])
        stream = net_stream.muxed_stream  # type: ignore[attr-defined]
        unread = 0
        try:
            for _ in range(3_000):
                stream.send_window = 1 << 30
                await stream.write(bytes(60_000))
                unread = max(unread, unread_by(alice, host.get_id()))
        except Exception:  # the victim hangs up, in one way or another
            pass
        with trio.fail_after(20):
            while alice._swarm.get_connections(host.get_id()):
                await trio.sleep(0.05)
        assert MIB < unread <= unread_bytes_per_peer_max
        await check()


def unread_by(victim: Network, peer: ID) -> int:
    unread = 0
    for conn in victim._swarm.get_connections(peer):
        assert isinstance(conn.muxed_conn, Yamux)
        unread += sum(map(len, conn.muxed_conn.stream_buffers.values()))
    return unread


@pytest.mark.slow
@trio_test
async def test_broken_muxer_frames_after_a_good_handshake() -> None:
    async with swarm() as (alice, check):
        chance = random.Random(6)
        for _ in range(12):
            async with attacker(alice) as (host, victim):
                (conn,) = host.get_network().get_connections(victim)
                muxed = conn.muxed_conn
                assert isinstance(muxed, Yamux)
                try:
                    for _ in range(20):
                        header = bytes((0, chance.randrange(5))) + chance.randbytes(10)
                        await muxed.secured_conn.write(header + chance.randbytes(50))
                except Exception:  # the victim hangs up, in one way or another
                    pass
            await check()


@trio_test
async def test_a_peer_that_reads_nothing_stalls_nobody_else() -> None:
    async with swarm() as (alice, check), attacker(alice) as (host, victim):
        ours = alice._greeting.ours()
        data = hello.MESSAGES.encode(ours)
        stream = await host.new_stream(victim, [TProtocol(hello.PROTOCOL)])
        await stream.write(HEADER.pack(FrameKind.REQUEST, 1, len(data), len(data)) + data)
        await stream.read(10)
        asking = await host.new_stream(victim, [TProtocol(PROTOCOL)])
        question = MESSAGES.encode(Echo(bytes(2_000_000)))
        for request in range(1, 9):
            for at in range(0, len(question), 60_000):
                piece = question[at : at + 60_000]
                header = HEADER.pack(FrameKind.REQUEST, request, len(question), len(piece))
                await asking.write(header + piece)
        await check()  # 16 MB of replies wait for a reader that does not come
