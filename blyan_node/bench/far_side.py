"""The other process of `activation-rtt` and `bulk`: one node, a plain TCP server, a stock stream.

usage: python -m blyan_node.bench.far_side

Prints where the three listen as one line of JSON and serves until its input ends.
"""

import os
import sys

import msgspec
import trio

from blyan_node.bench.links import TcpStream, answer
from blyan_node.network.interface import NetworkConfig
from blyan_node.network.network import Network
from blyan_node.network.stock import stock_listener
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT
from protocols.ids import ChunkHash, PeerId, chunk_hash
from protocols.signing import Identity
from protocols.sync.messages import CHUNKS, CHUNKS_PROTOCOL, Chunks, ChunksRequest
from protocols.wire import Messages

ECHO_PROTOCOL = "/blyan/bench/echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Echo(msgspec.Struct, frozen=True, array_like=True):
    """Comes back as it is."""

    data: bytes


ECHO = Messages(ECHO_PROTOCOL)
ECHO.register(1, Echo, bytes_max=limits.message_bytes_max)


class Addresses(msgspec.Struct, frozen=True):
    """Where the far side listens, and which chunks it has."""

    tcp: int
    stock: str
    node: str
    chunks: list[str]


def config_of(role: str, bootstrap: tuple[str, ...] = ()) -> NetworkConfig:
    """A node of the development network on loopback."""
    return NetworkConfig(
        network_id=DEVELOPMENT.id,
        network_name=DEVELOPMENT.name,
        role=role,
        version="bench",
        profile="bench",
        listen=(LOOPBACK,),
        bootstrap=bootstrap,
    )


async def main() -> None:
    """Serves until standard input ends."""
    pieces = [os.urandom(limits.chunk_bytes) for _ in range(limits.chunks_per_request_max)]
    chunks = {chunk_hash(data): data for data in pieces}
    network = Network(Identity.from_seed(os.urandom(32)), config_of("gpu"))

    async def echo(peer: PeerId, message: Echo) -> Echo:
        return message

    async def give(peer: PeerId, message: ChunksRequest) -> Chunks:
        return Chunks([chunks.get(ChunkHash(name)) for name in message.hashes])

    network.handle(ECHO_PROTOCOL, ECHO, echo)
    network.handle(CHUNKS_PROTOCOL, CHUNKS, give)
    whole = b"".join(pieces)
    async with (
        stock_listener(lambda stream: answer(stream, whole)) as stock,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(network.run)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

        async def serve(stream: trio.SocketStream) -> None:
            await answer(TcpStream(stream), whole)

        nursery.start_soon(trio.serve_listeners, serve, [listener])
        port = listener.socket.getsockname()[1]
        names = [name.hex() for name in chunks]
        print(msgspec.json.encode(Addresses(port, stock, network.addrs[0], names)).decode())
        sys.stdout.flush()
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
