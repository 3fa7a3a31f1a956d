"""Request and reply over a plain byte stream: the limit that our channel is held against.

A request is a one-byte kind and a length, then the body; so is a reply. Requests are answered in
order, any number may be under way.
"""

import struct
from typing import Protocol

import trio

HEAD = struct.Struct(">BI")
ECHO = 0
CHUNKS = 1


class ByteStream(Protocol):
    """What carries a link."""

    async def read(self, size: int) -> bytes:
        """Exactly `size` bytes; raises `EOFError` at the end."""

    async def write(self, data: bytes) -> None:
        """Writes all of `data`."""


class TcpStream:
    """Plain trio TCP, read straight into the result."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream

    async def read(self, size: int) -> bytes:
        """See `ByteStream`."""
        data = bytearray(size)
        view, at = memoryview(data), 0
        while at < size:
            got = await self._stream.socket.recv_into(view[at:])
            if not got:
                raise EOFError
            at += got
        return bytes(data)

    async def write(self, data: bytes) -> None:
        """See `ByteStream`."""
        await self._stream.send_all(data)


class Link:
    """The asking side of a byte stream."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._writing = trio.Lock()
        self._reading = trio.Lock()  # trio's locks are fair: replies are read in order of writing

    async def ask(self, kind: int, body: bytes) -> bytes:
        """The reply to one request."""
        async with self._writing:
            await self._stream.write(HEAD.pack(kind, len(body)) + body)
        async with self._reading:
            _, size = HEAD.unpack(await self._stream.read(HEAD.size))
            return await self._stream.read(size)


async def answer(stream: ByteStream, chunks: bytes) -> None:
    """The answering side: echoes, or sends `chunks`, until the other side is gone."""
    try:
        while True:
            kind, size = HEAD.unpack(await stream.read(HEAD.size))
            body = await stream.read(size)
            reply = body if kind == ECHO else chunks
            await stream.write(HEAD.pack(kind, len(reply)) + reply)
    except (EOFError, trio.BrokenResourceError):
        return
