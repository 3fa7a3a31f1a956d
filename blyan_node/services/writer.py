"""The tokens of an answer on their way to whoever asked, with the text that each adds."""

from collections.abc import Callable
from typing import Literal

import trio

from blyan_node.services.account import Account
from blyan_node.services.texts import TextProcess
from protocols.rpc.generate import Token

Emit = Callable[[Token], None]
Finish = Literal["length", "stop", "cancelled"]


class Writer:
    """Ends an answer after `most` tokens or at one of `stops`. `text` None: ids alone."""

    def __init__(
        self,
        text: TextProcess | None,
        account: Account,
        emit: Emit,
        stops: frozenset[int],
        most: int,
    ) -> None:
        self.ids: list[int] = []
        self._account = account
        self._emit = emit
        self._stops = stops
        self._most = most
        self._stream = None if text is None else text.stream()
        self._pieces: list[str] = []

    async def put(self, token: int) -> Finish | None:
        """Takes the next token; how the answer ends if this is its last."""
        self._account.token(trio.current_time())
        self.ids.append(token)
        finish: Finish | None = None
        if token in self._stops:
            finish = "stop"
        elif len(self.ids) == self._most:
            finish = "length"
        self._emit(Token(token_id=token, text=await self._text(token, finish)))
        return finish

    async def end(self) -> str | None:
        """The whole text."""
        if self._stream is None:
            return None
        self._pieces.append(await self._stream.finish())
        return "".join(self._pieces)

    async def _text(self, token: int, finish: Finish | None) -> str | None:
        """What the token adds; with the last one comes all that was held."""
        if self._stream is None:
            return None
        piece = "" if finish == "stop" else await self._stream.add(token)
        if finish is not None:
            piece += await self._stream.finish()
        self._pieces.append(piece)
        return piece
