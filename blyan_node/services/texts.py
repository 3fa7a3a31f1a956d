"""Tokenizers and chat templates of models, each in a process of its own (`moe.text_process`).

A process is started for the first request of a model and stays while one uses it; a few stay
afterwards. One that takes too long, wants too much memory or dies costs the request that it was
asked for, and is started again at the next.
"""

import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import trio

from blyan_node.moe.text import Windows
from blyan_node.moe.text_process import (
    LENGTH_BYTES,
    Answer,
    Chat,
    Decode,
    Decoded,
    Encode,
    Ids,
    Open,
    Opened,
    Refusal,
    Request,
    frame,
    text_files,
    too_much,
)
from blyan_node.services.models import Description
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId

log = logging.getLogger(__name__)
COMMAND = (sys.executable, "-m", "blyan_node.moe.text_process")
READ_BYTES = 64 * limits.KIB
idle_texts_max = 2

A = TypeVar("A", bound=Answer)


class _Died(Exception):
    """The process is gone, or says what it cannot."""


@dataclass
class TextProcess:
    """A model's text side. Every method raises `Refused`."""

    files: Mapping[str, bytes]
    users: int = 0
    special: Mapping[str, int] = field(default_factory=dict)  # ids by token, once it has started
    _process: trio.Process | None = None
    _turn: trio.Lock = field(default_factory=trio.Lock)

    async def encode(self, prompt: str) -> Sequence[int]:
        """The ids of a prompt."""
        return (await self._ask(Encode(prompt), Ids)).ids

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], effort: str | None = None
    ) -> Sequence[int]:
        """The ids of a conversation that the model is to answer."""
        asked = Chat([dict(message) for message in messages], effort)
        return (await self._ask(asked, Ids)).ids

    async def decode(self, *parts: Sequence[int]) -> Sequence[str]:
        """The texts of some lists of ids."""
        texts = (await self._ask(Decode([list(part) for part in parts]), Decoded)).texts
        if len(texts) != len(parts):
            raise too_much("another number of texts than was asked for")
        return texts

    def stream(self) -> "TextStream":
        """A decoder for one answer, token by token."""
        return TextStream(self)

    async def start(self) -> None:
        """Starts the process if it does not run, and has it read the files."""
        async with self._turn:
            await self._started()

    async def close(self) -> None:
        """Ends the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                for pipe in (process.stdin, process.stdout):
                    assert pipe is not None
                    await pipe.aclose()

    async def _ask(self, request: Request, kind: type[A]) -> A:
        async with self._turn:
            return await self._exchange(await self._started(), request, kind)

    async def _started(self) -> trio.Process:
        if self._process is not None and self._process.poll() is not None:
            await self.close()
        if self._process is None:
            self._process = await trio.lowlevel.open_process(
                COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            try:
                files = Open(text_files(self.files))
                self.special = (await self._exchange(self._process, files, Opened)).special
            except Refused:
                await self.close()
                raise
        return self._process

    async def _exchange(self, process: trio.Process, request: Request, kind: type[A]) -> A:
        """One question, one answer; a process that did not answer well is ended."""
        answer: Answer | None = None
        try:
            with trio.fail_after(limits.text_s_max):
                assert process.stdin is not None
                await process.stdin.send_all(frame(request))
                answer = await _receive(process)
        except trio.TooSlowError:
            raise too_much(f"longer than {limits.text_s_max} s") from None
        except (trio.BrokenResourceError, _Died) as error:
            log.warning("the text process of a model has died: %s", error)
            raise too_much("more memory than it may have, or it broke its process") from None
        finally:
            if not isinstance(answer, kind | Refusal):
                await self.close()
        if isinstance(answer, Refusal):
            code = ErrorCode(answer.code)
            raise Refused(code, answer.what, answer.why, answer.next, answer.data)
        assert isinstance(answer, kind)
        return answer


class TextStream:
    """The text of one answer as its tokens come; together what decoding them at once gives."""

    def __init__(self, text: TextProcess) -> None:
        self._text = text
        self._special = frozenset(text.special.values())
        self._windows = Windows()

    async def add(self, token: int) -> str:
        """The text that this token completes, often a piece of a word, sometimes nothing."""
        if token in self._special:
            return ""
        before, after = await self._text.decode(*self._windows.add(token))
        return self._windows.take(before, after)

    async def finish(self) -> str:
        """What is left when no token follows; incomplete characters become U+FFFD."""
        if not self._windows.holds:
            return ""
        before, after = await self._text.decode(*self._windows.now())
        return self._windows.take(before, after, last=True)


@dataclass
class Texts:
    """The text processes of this node, the longest unused first."""

    _known: dict[BlockId, TextProcess] = field(default_factory=dict)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Ends every process when it is cancelled."""
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            while self._known:
                await self._known.popitem()[1].close()

    @asynccontextmanager
    async def use(self, description: Description) -> AsyncIterator[TextProcess | None]:
        """The text side of a model, running; None if it has no tokenizer. Raises `Refused`."""
        if "tokenizer.json" not in description.files:
            yield None
            return
        text = self._known.pop(description.model, None) or TextProcess(description.files)
        self._known[description.model] = text
        text.users += 1
        try:
            await text.start()
            yield text
        finally:
            text.users -= 1
            await self._let_go()

    async def _let_go(self) -> None:
        idle = [model for model, text in self._known.items() if not text.users]
        for model in idle[: max(0, len(idle) - idle_texts_max)]:
            await self._known.pop(model).close()


async def _receive(process: trio.Process) -> Answer:
    """The next frame of `process`; raises `_Died`."""
    assert process.stdout is not None
    data = bytearray()
    wanted = LENGTH_BYTES
    while len(data) < wanted:
        piece = await process.stdout.receive_some(READ_BYTES)
        if not piece:
            raise _Died("its output has ended")
        data += piece
        if wanted == LENGTH_BYTES and len(data) >= LENGTH_BYTES:
            wanted += int.from_bytes(data[:LENGTH_BYTES], "big")
            if wanted > limits.text_answer_bytes_max:
                raise _Died(f"an answer of {wanted} bytes")
    try:
        answer: Answer = msgspec.msgpack.decode(data[LENGTH_BYTES:], type=Answer)
        return answer
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _Died(str(error)[:200]) from None
