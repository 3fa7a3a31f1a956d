"""Harmony: the form in which gpt_oss answers, read from its tokens as they come.

    <|start|>assistant<|channel|>analysis<|message|>…<|end|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>

An answer is a few messages, each with a header that names its channel. `final` is what the user is
meant to read, `analysis` and `commentary` are how the model came to it. The prompt ends with
`<|start|>assistant`, so an answer begins inside a header. The marks are special tokens, which no
text can forge; their ids are the tokenizer's. (https://github.com/openai/harmony)

The reader does not decode: it says which tokens are a channel's name, and is told what they say.
What stands outside of any message, as a model that has lost the form may write it, is read as
`final`, so that nothing is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
MARKS = (START, CHANNEL, MESSAGE, END, RETURN, CALL)
FINAL = "final"

_Place = Literal["outside", "header", "channel", "message"]


@dataclass(frozen=True)
class Begins:
    """A message begins; `channel` are the tokens that name its channel, none if it has none."""

    channel: tuple[int, ...]


@dataclass(frozen=True)
class Says:
    """The token is part of a message, or of none."""

    token: int


@dataclass
class Harmony:
    """Where in an answer the next token is. `marks` are the ids of `MARKS`."""

    marks: Mapping[str, int]
    special: frozenset[int]
    _place: _Place = "outside"
    _channel: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, special: Mapping[str, int]) -> Self | None:
        """A reader for a tokenizer with these special tokens, None if it lacks a mark."""
        if not all(name in special for name in MARKS):
            return None
        return cls({name: special[name] for name in MARKS}, frozenset(special.values()))

    def take(self, token: int) -> Begins | Says | None:
        """What the next token means for the answer's text."""
        if token in self.special:
            return self._mark(token)
        if self._place == "channel":
            self._channel.append(token)
        if self._place in ("header", "channel"):
            return None
        return Says(token)

    def _mark(self, token: int) -> Begins | None:
        marks = self.marks
        if token == marks[MESSAGE]:
            channel, self._place = tuple(self._channel), "message"
            self._channel.clear()
            return Begins(channel)
        if token == marks[CHANNEL]:
            self._place = "channel"
            self._channel.clear()
        elif token == marks[START]:
            self._place = "header"
            self._channel.clear()
        elif token in (marks[END], marks[RETURN], marks[CALL]):
            self._place = "outside"
            return Begins(())
        elif self._place == "channel":  # a mark that tells the form of the content
            self._place = "header"
        return None
