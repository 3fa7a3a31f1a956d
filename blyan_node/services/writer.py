"""The tokens of an answer on their way to whoever asked, with the text that each adds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import trio

from blyan_node.moe.stop_strings import StopStrings
from blyan_node.services.account import Account
from blyan_node.services.speech import Said, Speech
from protocols.rpc.generate import Token

Emit = Callable[[Token], None]
Finish = Literal["length", "stop", "cancelled"]


@dataclass(frozen=True)
class Ends:
    """An answer ends after `most` tokens, at one of `tokens`, or before one of `strings`."""

    most: int
    tokens: frozenset[int] = frozenset()
    strings: tuple[str, ...] = ()

    def reached(self, token: int, count: int) -> Finish | None:
        """How the answer ends with this token, the last of so many; None if it goes on."""
        if token in self.tokens:
            return "stop"
        return "length" if count == self.most else None


class Writer:
    """Passes an answer on up to its end. `speech` None: ids alone."""

    def __init__(self, speech: Speech | None, account: Account, emit: Emit, ends: Ends) -> None:
        self.ids: list[int] = []
        self._speech = speech
        self._account = account
        self._emit = emit
        self._ends = ends
        self._cut = StopStrings(ends.strings)
        self._texts: list[str] = []
        self._thoughts: list[str] | None = None

    @property
    def reasoning(self) -> str | None:
        """What was said apart from the text so far; None if all that is said is text."""
        return None if self._thoughts is None else "".join(self._thoughts)

    async def put(self, token: int) -> Finish | None:
        """Takes the next token; how the answer ends if this is its last."""
        self._account.token(trio.current_time())
        self.ids.append(token)
        finish = self._ends.reached(token, len(self.ids))
        if self._speech is None:
            self._emit(Token(token_id=token, text=None))
            return finish
        said = Said() if finish == "stop" else self._take(await self._speech.add(token))
        if finish is not None:  # with the last token comes all that was held
            said = _both(said, await self._finish())
        self._emit(Token(token_id=token, text=said.text, reasoning=said.reasoning))
        return "stop" if self._cut.found else finish

    async def end(self) -> str | None:
        """The whole text."""
        if self._speech is None:
            return None
        await self._finish()
        return "".join(self._texts)

    async def _finish(self) -> Said:
        assert self._speech is not None
        said = self._take(await self._speech.finish())
        rest = self._cut.finish()
        self._texts.append(rest)
        return _both(said, Said(rest))

    def _take(self, said: Said) -> Said:
        """What of it is passed on."""
        text = self._cut.add(said.text)
        self._texts.append(text)
        if said.reasoning is not None:
            if self._thoughts is None:
                self._thoughts = []
            self._thoughts.append(said.reasoning)
        return Said(text, said.reasoning)


def _both(first: Said, second: Said) -> Said:
    told = [one.reasoning for one in (first, second) if one.reasoning is not None]
    return Said(first.text + second.text, "".join(told) if told else None)
