"""Random bytes on every door of a running daemon: it lives, still answers, and keeps its peers.

The doors are the RPC's socket, the TCP port, and each libp2p protocol that the daemon says it has.
"""

import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import trio
from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import TProtocol
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.network.stream.exceptions import StreamEOF
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.tools.anyio_service.context import background_trio_service
from libp2p.utils.varint import encode_varint_prefixed
from multiaddr import Multiaddr

from blyan_node.bench.models import write_model
from blyan_node.testing.daemons import Node, Testnet
from protocols import hello, limits
from protocols.channel.frames import HEADER, FrameKind
from protocols.dag.genesis import Genesis
from protocols.sync.messages import CHUNKS, SYNC, BlocksRequest, ChunksRequest, LogRequest
from protocols.tensors.manifest import Dtype

SEED = random.SystemRandom().getrandbits(32)
GROWTH_BYTES_MAX = 96 * limits.MIB
ATTACK_S_MAX = 60
ASK = ("--prompt-ids", "3,17,42", "--max-tokens", 4, "--temperature", 0, "--ignore-eos")
SMALL: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    """Alice, the victim, and bob, who holds the experts of a model that she answers with."""
    net = Testnet(tmp_path_factory.mktemp("net"))
    net.run("up", "--nodes", 2)
    model = write_model(tmp_path_factory.mktemp("model") / "m", Dtype.F32, **SMALL)
    net["alice"]("model", "publish", model, "--name", "small", "--wait-replicas", 1)
    yield net
    net.run("down")


@pytest.fixture
def alice(pair: Testnet) -> Iterator[Node]:
    """The victim; after the attack she is as she was before."""
    print(f"seed {SEED}")
    alice, bob = pair["alice"], pair["bob"]
    process = psutil.Process(alice.pid)
    expected = alice("generate", "--model", "small", *ASK)
    (before,) = alice("peers")["peers"]
    started, bytes_before, files_before = _state(process)
    yield alice
    answer = alice("generate", "--model", "small", *ASK)
    assert answer["token_ids"] == expected["token_ids"]
    assert bob.peer_id in str(answer["trace"])
    (after,) = alice("peers")["peers"]
    assert (after["peer_id"], after["since"]) == (bob.peer_id, before["since"]), "bob was lost"
    started_after, bytes_after, files_after = _state(process)
    assert started_after == started
    assert bytes_after - bytes_before < GROWTH_BYTES_MAX
    assert files_after - files_before < 64
    log = (pair.dir / "alice.log").read_text()
    assert "Traceback" not in log and '"critical"' not in log, log[-3000:]


def _state(process: psutil.Process) -> tuple[float, int, int]:
    return process.create_time(), process.memory_info().rss, process.num_fds()


@contextmanager
def _line(node: Node) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(node.rpc)
        link.settimeout(60)
        yield link


def _request(method: str, number: int = 1, **params: object) -> bytes:
    request = {"jsonrpc": "2.0", "id": number, "method": method, "params": params}
    return json.dumps(request).encode() + b"\n"


LINES = {
    "no JSON": b"hello\n",
    "invalid UTF-8": b'{"jsonrpc":"2.0","id":1,"method":"\xff\xfe"}\n',
    "invalid UTF-8 in a parameter": _request("model.show", model="X").replace(b"X", b"\xc3\x28"),
    "deep arrays": b"[" * 100_000 + b"\n",
    "deep parameters": _request("model.show", model="X").replace(b'"X"', b'{"a":' * 50_000),
    "a lone surrogate": b'{"jsonrpc":"2.0","id":1,"method":"\\ud800"}\n',
    "a huge number": b'{"jsonrpc":"2.0","id":' + b"9" * 100_000 + b',"method":"node.id"}\n',
    "a null byte": b"\x00\n",
    "a batch of nothing": b"[]\n",
    "a batch of rubbish": b"[" + b",".join([b"1"] * limits.rpc_batch_max) + b"]\n",
}


@pytest.mark.parametrize("what", LINES)
def test_a_bad_line_is_told_and_the_next_one_answered(alice: Node, what: str) -> None:
    with _line(alice) as link, link.makefile("rb") as replies:
        link.sendall(LINES[what])
        told = json.loads(replies.readline())
        assert "error" in (told[0] if isinstance(told, list) else told)
        link.sendall(_request("node.id", 2))
        assert json.loads(replies.readline())["result"]["peer_id"] == alice.peer_id


def test_huge_lines_are_cut_off(alice: Node) -> None:
    for _ in range(20):
        with _line(alice) as link, link.makefile("rb") as replies:
            with suppress(BrokenPipeError, ConnectionResetError):  # it does not wait for the end
                for _ in range(8):
                    link.sendall(b"x" * limits.MIB)
            with suppress(ConnectionResetError):
                assert "error" in json.loads(replies.readline() or b'{"error": 0}')


def test_random_bytes_on_the_rpc_socket(alice: Node) -> None:
    rng = random.Random(SEED)
    good = _request("generate.run", model="small", prompt_ids=[1], max_tokens=2, temperature=0)
    for case in range(300):
        data = bytearray(rng.randbytes(rng.randrange(1, 5_000)) if case % 2 else good)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data)) :] = rng.randbytes(rng.randrange(200)) or b"\n"
        with _line(alice) as link, suppress(BrokenPipeError, ConnectionResetError):
            link.sendall(data + b"\n" * rng.randrange(2))
            if case % 3:
                link.shutdown(socket.SHUT_WR)
                while link.recv(65536):
                    pass


def test_a_thousand_clients_that_vanish(alice: Node) -> None:
    asked = _request("generate.run", model="small", prompt_ids=[1], max_tokens=9_000)
    endless = _request("events.subscribe")
    for case in range(1_000):
        with _line(alice) as link, suppress(BrokenPipeError, ConnectionResetError):
            link.sendall((b"", asked[:20], asked, endless)[case % 4])


def test_a_slow_reader_delays_nobody(alice: Node) -> None:
    """It has far more asked for than a socket holds, and a stream that runs, and reads nothing."""
    ask = {"model": "small", "prompt_ids": [1], "max_tokens": 9_000, "ignore_eos": True}
    with _line(alice) as link:
        link.sendall(_request("generate.run", **ask))
        link.sendall(b"".join(_request("rpc.discover", number) for number in range(2, 60)))
        assert link.recv(1) == b"{"
        assert len(alice.call("generate.run", ask | {"max_tokens": 20})["token_ids"]) == 20


def test_random_bytes_on_the_port(alice: Node) -> None:
    rng = random.Random(SEED)
    port = int(alice.addrs[0].split("/")[4])
    held: list[socket.socket] = []
    for case in range(200):
        link = socket.create_connection(("127.0.0.1", port))
        with suppress(BrokenPipeError, ConnectionResetError):
            if case % 3:
                link.sendall(b"\x13/multistream/1.0.0\n\x07/noise\n" * (case % 3 - 1))
                link.sendall(rng.randbytes(rng.randrange(1, 5_000)))
        held.append(link)
        if case % 2:
            held.pop(rng.randrange(len(held))).close()
    assert alice("peers")["peers"]
    for link in held:
        link.close()


@asynccontextmanager
async def _stranger(node: Node) -> AsyncIterator[tuple[IHost, ID]]:
    """A stock libp2p host that is connected to `node`."""
    keys = create_new_key_pair()
    noise = NoiseTransport(keys, noise_privkey=create_noise_key().private_key)
    host = new_host(key_pair=keys, sec_opt={NOISE: noise})  # type: ignore[arg-type]
    async with background_trio_service(host.get_network()):
        info = info_from_p2p_addr(Multiaddr(node.addrs[0]))
        try:
            await host.connect(info)
            yield host, info.peer_id
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 3):
                for connection in host.get_network().get_connections():
                    await connection.muxed_conn.secured_conn.close()


def _attack(attack: Callable[[], object]) -> None:
    async def bounded() -> None:
        with trio.fail_after(ATTACK_S_MAX):
            await attack()  # type: ignore[misc]

    trio.run(bounded)


async def _protocols(node: Node) -> list[str]:
    """What the node says it speaks."""
    async with _stranger(node) as (host, victim):
        stream = await host.new_stream(victim, [TProtocol("/ipfs/id/1.0.0")])
        said = bytearray()
        with suppress(StreamEOF):
            while True:
                said += await stream.read(65536)
        length, at = said[0] & 0x7F, 1
        while said[at - 1] & 0x80:
            length |= (said[at] & 0x7F) << (7 * at)
            at += 1
        return sorted(Identify.FromString(bytes(said[at : at + length])).protocols)


def test_random_bytes_on_each_protocol(alice: Node) -> None:
    """Six hosts throw at every protocol of the node: bare bytes, and bytes in a frame."""
    spoken: list[str] = []

    async def throw(host: IHost, victim: ID, protocol: str, data: bytes) -> None:
        with suppress(Exception):  # whatever the victim does to us is fine
            stream = await host.new_stream(victim, [TProtocol(protocol)])
            await stream.write(data)
            with trio.move_on_after(0.2):
                while await stream.read(65536):
                    pass
            await stream.reset()

    async def attack() -> None:
        rng = random.Random(SEED)
        spoken.extend(await _protocols(alice))
        for _ in range(6):
            async with _stranger(alice) as (host, victim), trio.open_nursery() as nursery:
                for protocol in spoken:
                    data = rng.randbytes(rng.choice([0, 1, 40, 3_000, 70_000]))
                    nursery.start_soon(throw, host, victim, protocol, data)
                    framed = encode_varint_prefixed(data)
                    nursery.start_soon(throw, host, victim, protocol, framed)

    _attack(attack)
    print(spoken)
    ours = {"hello", "sync", "chunks", "expert", "adverts"}
    assert ours <= {protocol.split("/")[2] for protocol in spoken if "/blyan/" in protocol}
    assert {"/meshsub/1.1.0", "/ipfs/kad/1.0.0", "/ipfs/ping/1.0.0"} <= set(spoken)


def _request_frame(number: int, data: bytes) -> bytes:
    return HEADER.pack(FrameKind.REQUEST, number, len(data), len(data)) + data


def _spoilt(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Messages in good frames: of no kind, of good kinds with random fields, and nearly right."""
    good = {
        "/blyan/sync/1": [SYNC.encode(LogRequest(0, 100)), SYNC.encode(BlocksRequest([bytes(36)]))],
        "/blyan/chunks/1": [CHUNKS.encode(ChunksRequest([bytes(32)]))],
        "/blyan/hello/1": [],
        "/blyan/expert/1": [],
        "/blyan/adverts/1": [],
    }
    for protocol, messages in good.items():
        for kind in range(9):
            yield protocol, bytes((kind,)) + rng.randbytes(rng.randrange(300))
            yield protocol, bytes((kind,)) + b"\x91" * rng.randrange(5_000)  # lists in lists
        for message in messages * 20:
            data = bytearray(message)
            data[rng.randrange(len(data))] = rng.randrange(256)
            yield protocol, bytes(data)


def test_bad_messages_of_a_peer_that_said_hello(alice: Node, pair: Testnet) -> None:
    """Once it has lost its score it is sent away, and comes back under another name."""
    genesis = Genesis.from_json(Path(pair.run("status")["network"]).read_text())
    ours = hello.hello_of(
        genesis.id, genesis.name, version="0", role="gpu", profile="none",
        summary=hello.HelloSummary(), addrs=[], peers=[],
    )  # fmt: skip
    greeting = _request_frame(1, hello.MESSAGES.encode(ours))
    asked = _request_frame(2, SYNC.encode(LogRequest(0, 100)))
    rng = random.Random(SEED)
    spoilt = list(_spoilt(rng))
    rng.shuffle(spoilt)
    answered = 0

    async def ask(host: IHost, victim: ID, protocol: str, data: bytes) -> bytes:
        stream = await host.new_stream(victim, [TProtocol(protocol)])
        await stream.write(data)
        return await stream.read(65536)

    async def attack() -> None:
        nonlocal answered
        while spoilt:
            async with _stranger(alice) as (host, victim):
                for protocol, good in ((hello.PROTOCOL, greeting), (SYNC.protocol, asked)):
                    assert (await ask(host, victim, protocol, good))[0] == FrameKind.REPLY
                with suppress(Exception):  # it hangs up, in one way or another
                    for number in range(3, 40):
                        protocol, message = spoilt.pop()
                        with trio.move_on_after(1):
                            await ask(host, victim, protocol, _request_frame(number, message))
                            answered += 1

    _attack(attack)
    assert answered
