"""The hub process as the daemon sees it: started for one download, killed at its end."""

import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from blyan_node.hub.messages import (
    LENGTH_BYTES,
    Answer,
    Get,
    Got,
    Listing,
    Look,
    Open,
    Refusal,
    Request,
    Whole,
    frame,
)
from protocols import limits
from protocols.errors import ErrorCode, Refused

COMMAND = (sys.executable, "-m", "blyan_node.hub.process")
READ_BYTES = 64 * limits.KIB

A = TypeVar("A", bound=Answer)


class HubProcess:
    """Asks one question after another. Every method raises `Refused`."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._read = bytearray()

    async def look(self, repository: str, revision: str) -> Listing:
        """The commit that a revision is now, and the files of its root folder."""
        return await self._ask(Look(repository, revision), Listing, lambda done: None)

    async def get(
        self, name: str, path: Path, tell: Callable[[int], None], upto: int | None = None
    ) -> None:
        """Completes the file `path`, all of it or its first bytes; `tell` hears how long it is."""
        await self._ask(Get(name, str(path), upto), Whole, tell)

    async def _ask(self, request: Look | Get, kind: type[A], tell: Callable[[int], None]) -> A:
        await self._send(request)
        while True:
            with trio.move_on_after(limits.hub_silence_s_max) as patience:
                answer = await self._receive()
            if patience.cancelled_caught:
                raise _failed(ErrorCode.TIMEOUT, "the hub does not answer", request)
            if isinstance(answer, Got):
                tell(answer.done)
            elif isinstance(answer, Refusal):
                code = ErrorCode(answer.code)
                raise Refused(code, answer.what, answer.why, answer.next, answer.data)
            elif isinstance(answer, kind):
                return answer
            else:
                raise _failed(ErrorCode.HUB_FAILED, "its process has died", request)

    async def _send(self, request: Request) -> None:
        assert self._process.stdin is not None
        with suppress(trio.BrokenResourceError):  # it has died, which reading its answer shows
            await self._process.stdin.send_all(frame(request))

    async def _receive(self) -> Answer | None:
        """The next frame, None if there is none that can be read."""
        head = await self._take(LENGTH_BYTES)
        size = int.from_bytes(head or b"", "big")
        if head is None or size > limits.hub_answer_bytes_max:
            return None
        data = await self._take(size)
        try:
            answer: Answer | None = None
            if data is not None:
                answer = msgspec.msgpack.decode(data, type=Answer)
            return answer
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def _take(self, size: int) -> bytes | None:
        assert self._process.stdout is not None
        while len(self._read) < size:
            piece = await self._process.stdout.receive_some(READ_BYTES)
            if not piece:
                return None
            self._read += piece
        data = bytes(self._read[:size])
        del self._read[:size]
        return data


@asynccontextmanager
async def hub_process(endpoint: str, home: Path) -> AsyncIterator[HubProcess]:
    """A process that talks to the hub at `endpoint`; it is gone when the block is left."""
    process = await trio.lowlevel.open_process(
        COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        hub = HubProcess(process)
        settings = Open(
            endpoint,
            str(home),
            limits.hub_read_s_max,
            limits.hub_pause_s,
            limits.hub_tries_max,
        )
        await hub._send(settings)
        yield hub
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                await pipe.aclose()


def _failed(code: ErrorCode, why: str, request: Look | Get) -> Refused:
    of = request.name if isinstance(request, Get) else request.repository
    return Refused(
        code,
        f"nothing was published: {of} could not be downloaded",
        why,
        "What came is kept: try again later, or look at `hub_endpoint` in config.toml.",
        {"file" if isinstance(request, Get) else "source": of},
    )
