"""What the tokens of an answer say: its text, and apart from it how the model came to it."""

from typing import NamedTuple, Protocol

from blyan_node.moe.harmony import FINAL, Begins, Harmony, Says
from blyan_node.services.texts import TextProcess


class Said(NamedTuple):
    """What a token adds to the answer's text and to its reasoning."""

    text: str = ""
    reasoning: str | None = None  # None: this model does not tell the two apart


class Speech(Protocol):
    """Reads one answer, token by token; together what decoding its parts at once gives."""

    async def add(self, token: int) -> Said:
        """What this token completes."""

    async def finish(self) -> Said:
        """What is left when no token follows."""


class PlainSpeech:
    """All that is said is text."""

    def __init__(self, text: TextProcess) -> None:
        self._stream = text.stream()

    async def add(self, token: int) -> Said:
        """What this token completes."""
        return Said(await self._stream.add(token))

    async def finish(self) -> Said:
        """What is left when no token follows."""
        return Said(await self._stream.finish())


class HarmonySpeech:
    """The final channel is text, the others are reasoning; messages of either are lines apart."""

    def __init__(self, text: TextProcess, reader: Harmony) -> None:
        self._text = text
        self._reader = reader
        self._stream = text.stream()
        self._final = True
        self._begun = {True: False, False: False}  # of either: whether something was said
        self._apart = False  # a message has begun and nothing of it was said

    async def add(self, token: int) -> Said:
        """What this token completes."""
        match self._reader.take(token):
            case Says(token):
                return self._said(await self._stream.add(token))
            case Begins(channel):
                rest = self._said(await self._stream.finish())
                await self._begin(channel)
                return rest
        return Said("", "")

    async def finish(self) -> Said:
        """What is left when no token follows."""
        return self._said(await self._stream.finish())

    async def _begin(self, channel: tuple[int, ...]) -> None:
        (name,) = await self._text.decode(channel) if channel else (FINAL,)
        self._final = name.split()[:1] in ([], [FINAL])
        self._stream, self._apart = self._text.stream(), True

    def _said(self, piece: str) -> Said:
        if piece:
            if self._apart and self._begun[self._final]:
                piece = "\n" + piece
            self._begun[self._final], self._apart = True, False
        return Said(piece, "") if self._final else Said("", piece)
