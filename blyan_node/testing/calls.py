"""Requests between the nodes of a `Fabric`: those that a node makes, and those that it answers."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import trio

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import Counters, Handler
from protocols.errors import ErrorCode as Code
from protocols.errors import LocalProtocolError, Refused, RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import handlers_per_peer_max
from protocols.wire import Messages


class Medium(Protocol):
    """What lies between the nodes."""

    async def pass_time(self) -> None:
        """One message's way; always a checkpoint."""

    def lost(self) -> bool:
        """Whether this message is one that never arrives."""

    def calls_of(self, peer: PeerId) -> "Calls | None":
        """A node's side of its calls; None if it does not run."""


class Calls:
    """One node's side. Every message passes through its codec, as it would on a wire."""

    def __init__(
        self,
        own: PeerId,
        medium: Medium,
        counters: Counters,
        penalise: Callable[[PeerId, Exception], None],
    ) -> None:
        self._own = own
        self._medium = medium
        self._counters = counters
        self._penalise = penalise
        self.handlers: dict[str, tuple[Messages, Handler]] = {}  # a test may put liars here
        self._pending: dict[PeerId, dict[trio.CancelScope, None]] = {}
        self._rooms: dict[tuple[PeerId, str], trio.CapacityLimiter] = {}
        self.nursery: trio.Nursery | None = None

    def handle(self, protocol: str, messages: Messages, handler: Handler) -> None:
        """Registers who answers on `protocol`."""
        if protocol in self.handlers:
            raise LocalProtocolError(f"{protocol} has a handler already")
        self.handlers[protocol] = (messages, handler)

    async def request(self, peer: PeerId, protocol: str, message: object, timeout_s: float) -> Any:
        """Asks another node, to which there is a connection."""
        other = self._medium.calls_of(peer)
        if other is None:
            raise PeerGone(peer, "not connected")
        codec = other._codec(protocol)
        sent = codec.encode(message)
        self._counters.requests_sent += 1
        self._counters.bytes_out += len(sent)
        with trio.move_on_after(timeout_s) as late, self._guard(peer) as cut:
            reply = await self._round_trip(peer, protocol, sent)
            self._counters.bytes_in += len(reply)
            return codec.decode(reply)
        if cut.cancelled_caught:
            raise PeerGone(peer, "the connection was cut")
        assert late.cancelled_caught
        raise RequestTimeout(peer, protocol, timeout_s)

    def cut(self, peer: PeerId) -> None:
        """The connection to `peer` is gone, and with it all that was asked of it."""
        for scope in self._pending.pop(peer, {}):
            scope.cancel()

    async def _round_trip(self, peer: PeerId, protocol: str, sent: bytes) -> bytes:
        await self._medium.pass_time()
        if self._medium.lost():
            await trio.sleep_forever()
        other = self._medium.calls_of(peer)
        if other is None or other.nursery is None:
            raise PeerGone(peer, "it left while the request was on its way")
        answered = trio.Event()
        outcome: list[bytes | Exception] = []

        async def serve() -> None:
            outcome.append(await other._serve(self._own, protocol, sent))
            answered.set()

        serving = trio.CancelScope()
        other.nursery.start_soon(_within, serving, serve)
        try:
            await answered.wait()
        finally:
            serving.cancel()
        await self._medium.pass_time()
        if isinstance(outcome[0], Refused):
            raise PeerRefused(peer, outcome[0])
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    @contextmanager
    def _guard(self, peer: PeerId) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as cut:
            pending = self._pending.setdefault(peer, {})
            pending[cut] = None
            try:
                yield cut
            finally:
                pending.pop(cut, None)

    async def _serve(self, peer: PeerId, protocol: str, data: bytes) -> bytes | Exception:
        """Answers one request of `peer`; what the asker is to see as an exception is returned."""
        messages, handler = self.handlers[protocol]
        self._counters.requests_served += 1
        self._counters.bytes_in += len(data)
        room = trio.CapacityLimiter(handlers_per_peer_max)
        async with self._rooms.setdefault((peer, protocol), room):
            try:
                reply = messages.encode(await handler(peer, messages.decode(data)))
            except Refused as refused:
                return refused
            except RemoteProtocolError as error:
                self._penalise(peer, error)
                return Refused(Code.BAD_INPUT, "the request is malformed", str(error))
        self._counters.bytes_out += len(reply)
        return reply

    def _codec(self, protocol: str) -> Messages:
        """The messages of `protocol`, or PeerRefused as the asker would see it."""
        if protocol not in self.handlers:
            refused = Refused(Code.NOT_FOUND, f"{protocol} is not spoken here", "")
            raise PeerRefused(self._own, refused)
        return self.handlers[protocol][0]


async def _within(scope: trio.CancelScope, work: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await work()
