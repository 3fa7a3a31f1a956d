"""A plain libp2p stream, as the library makes it: what our channel is measured against.

It is here because this package is the only importer of libp2p. Nothing that serves uses it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from libp2p import new_host
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.peerinfo import info_from_p2p_addr
from multiaddr import Multiaddr

PROTOCOL = TProtocol("/blyan/bench/stock/1")
LOOPBACK = Multiaddr("/ip4/127.0.0.1/tcp/0")


class StockStream:
    """A libp2p stream with exact reads."""

    def __init__(self, stream: INetStream) -> None:
        self._stream = stream

    async def read(self, size: int) -> bytes:
        """Exactly `size` bytes; raises `EOFError` at the end of the stream."""
        data = bytearray()
        while len(data) < size:
            part = await self._stream.read(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """Writes all of `data`."""
        await self._stream.write(data)


@asynccontextmanager
async def stock_listener(serve: Callable[[StockStream], Awaitable[None]]) -> AsyncIterator[str]:
    """A host on loopback that gives each stream to `serve`; yields its address with `/p2p/`."""
    host = new_host()

    async def handle(stream: INetStream) -> None:
        await serve(StockStream(stream))

    async with host.run([LOOPBACK]):
        host.set_stream_handler(PROTOCOL, handle)
        yield str(host.get_addrs()[0])


@asynccontextmanager
async def stock_stream(addr: str) -> AsyncIterator[StockStream]:
    """One stream to a `stock_listener`, kept open."""
    host = new_host()
    async with host.run([]):
        peer = info_from_p2p_addr(Multiaddr(addr))
        await host.connect(peer)
        stream = await host.new_stream(peer.peer_id, [PROTOCOL])
        yield StockStream(stream)
        await stream.close()
