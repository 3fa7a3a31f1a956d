"""What a handler knows of the request that it answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import trio

from protocols.rpc import codec
from protocols.rpc.calls import Progress
from protocols.rpc.codec import RequestId
from protocols.rpc.table import EVENTS, PROGRESS, TOKENS, Stream

PROGRESS_EVERY_S = 0.1
CANCEL_GRACE_S = 5.0
_STREAM_OF = {stream.params: stream for stream in (PROGRESS, TOKENS, EVENTS)}


class Client(Protocol):
    """The connection as a handler sees it."""

    def put(self, line: bytes) -> None:
        """Sends a line when the client takes it."""

    async def wait_not_full(self) -> None:
        """Waits while much is on its way that the client has not taken."""

    def cancel(self, request_id: RequestId) -> bool:
        """Ends a request of this client early; False if there is no such request."""


@dataclass
class Context:
    """One running request: its notifications, its progress and its end before time."""

    request_id: RequestId | None
    client: Client
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _on_cancel: Callable[[], None] | None = None
    _after_reply: Callable[[], None] | None = None
    _last: tuple[str, float] = ("", 0.0)

    def notify(self, params: msgspec.Struct) -> None:
        """Sends one message of a stream; the kind of `params` says which stream."""
        stream: Stream = _STREAM_OF[type(params)]
        self.client.put(codec.notification(stream.name, self.request_id, params))

    async def room(self) -> None:
        """Waits until the client reads what it is sent; at once, as a rule."""
        await self.client.wait_not_full()

    def progress(self, done: int, total: int | None, what: str, unit: str = "bytes") -> None:
        """Tells how far the request is: seldom enough to cost nothing, and always at the end."""
        now = trio.current_time()
        if done != total and what == self._last[0] and now < self._last[1] + PROGRESS_EVERY_S:
            return
        self._last = (what, now)
        self.notify(Progress(what=what, done=done, total=total, unit=unit))

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Makes cancelling call `callback` instead; the handler then has a few seconds to end."""
        self._on_cancel = callback

    def after_reply(self, callback: Callable[[], None]) -> None:
        """Has `callback` called once the answer is on its way to the client."""
        self._after_reply = callback

    def replied(self) -> None:
        """The answer is on its way."""
        if self._after_reply is not None:
            self._after_reply()

    def cancel(self) -> None:
        """Ends the request early."""
        if self._on_cancel is None:
            self.scope.cancel()
            return
        self.scope.deadline = min(self.scope.deadline, trio.current_time() + CANCEL_GRACE_S)
        self._on_cancel()
