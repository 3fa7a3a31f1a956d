"""The asking process of `activation-rtt` and `bulk`, with one way to ask for each carrier."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec
import trio

from blyan_node.bench import links
from blyan_node.bench.far_side import ECHO, ECHO_PROTOCOL, Addresses, Echo, config_of
from blyan_node.bench.links import Link, TcpStream
from blyan_node.network.network import Network
from blyan_node.network.stock import stock_stream
from protocols.ids import ChunkHash, chunk_hash
from protocols.signing import Identity
from protocols.sync.messages import CHUNKS, CHUNKS_PROTOCOL, Chunks, ChunksRequest


@dataclass(frozen=True)
class Carrier:
    """`echo` sends bytes there and back; `chunks` fetches a full request of chunks."""

    echo: Callable[[bytes], Awaitable[object]]
    chunks: Callable[[], Awaitable[None]]


@asynccontextmanager
async def carriers() -> AsyncIterator[dict[str, Carrier]]:
    """Ours, plain trio TCP and a stock libp2p stream to one far side."""
    with far_side() as addresses:
        async with (
            stock_stream(addresses.stock) as stock,
            await trio.open_tcp_stream("127.0.0.1", addresses.tcp) as tcp,
            trio.open_nursery() as nursery,
        ):
            network = Network(
                Identity.from_seed(os.urandom(32)), config_of("main", (addresses.node,))
            )
            network.handle(ECHO_PROTOCOL, ECHO, _nobody_asks)
            network.handle(CHUNKS_PROTOCOL, CHUNKS, _nobody_asks)
            await nursery.start(network.run)
            yield {
                "ours": await _ours(network, addresses),
                "tcp": _over(Link(TcpStream(tcp))),
                "stock": _over(Link(stock)),
            }
            nursery.cancel_scope.cancel()


@contextmanager
def far_side() -> Iterator[Addresses]:
    """The other process; it ends with the block."""
    command = [sys.executable, "-m", "blyan_node.bench.far_side"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        yield msgspec.json.decode(process.stdout.readline(), type=Addresses)
        process.stdin.close()


async def _nobody_asks(peer: object, message: object) -> object:
    raise AssertionError("the far side only answers")


async def _ours(network: Network, addresses: Addresses) -> Carrier:
    peer = await network.connect(addresses.node)
    names = [ChunkHash(bytes.fromhex(name)) for name in addresses.chunks]

    async def echo(data: bytes) -> object:
        return await network.request(peer, ECHO_PROTOCOL, Echo(data))

    async def chunks() -> None:
        reply: Chunks = await network.request(peer, CHUNKS_PROTOCOL, ChunksRequest(list(names)))
        for name, data in zip(names, reply.data, strict=True):
            if data is None or chunk_hash(data) != name:
                raise RuntimeError("the far side sent another chunk")

    return Carrier(echo, chunks)


def _over(link: Link) -> Carrier:
    async def echo(data: bytes) -> object:
        return await link.ask(links.ECHO, data)

    async def chunks() -> None:
        await link.ask(links.CHUNKS, bytes(256))  # about as long as a request of ours

    return Carrier(echo, chunks)
