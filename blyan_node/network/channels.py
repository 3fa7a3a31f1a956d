"""Streams that stay open, one per peer and protocol and direction, driven by `protocols.channel`.

Each end has one task that reads and one that writes, and nobody cancels them before the stream has
ended: with py-libp2p 0.8.1 a cancelled read loses data. Whoever asks talks to them through the
asker's core, so a cancelled request costs a CANCEL frame and nothing else.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import trio
from libp2p.abc import INetStream

from blyan_node.network.interface import Counters, Handler
from blyan_node.network.traffic import Meters, Traffic
from protocols.channel.answerer import Answerer, Asked
from protocols.channel.asker import Answered, Asker
from protocols.channel.refusal import CANCELLED
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import channel_unsent_bytes_max, message_bytes_max, write_bytes_max
from protocols.wire import Messages

log = logging.getLogger("blyan.network")

_READ_BYTES = 2 * write_bytes_max


class StreamEnded(Exception):
    """The stream is gone: closed, reset, or the connection under it died."""


class _Wire:
    """What both ends share: the stream, waking the writer, closing once."""

    def __init__(
        self, stream: INetStream, core: Asker | Answerer, counters: Counters, meters: Meters
    ) -> None:
        self._stream = stream
        self._core = core
        self._counted: tuple[Counters | Traffic, ...] = (counters, *meters)
        self._more = trio.Event()
        self._left = trio.Event()

    def wake(self) -> None:
        """There may be something to write."""
        self._more.set()

    async def read(self) -> bytes:
        """The next bytes; raises `StreamEnded`."""
        try:
            data = await self._stream.read(_READ_BYTES)
        except Exception as error:  # py-libp2p's errors share no base
            raise StreamEnded(_reason(error)) from None
        if not data:
            raise StreamEnded("closed")
        for counted in self._counted:
            counted.bytes_in += len(data)
        return data

    async def write_all(self) -> None:
        """Writes what the core has, for ever; raises `StreamEnded`."""
        while True:
            self._more = trio.Event()
            while data := self._core.take():
                try:
                    await self._stream.write(data)
                except Exception as error:  # py-libp2p's errors share no base
                    raise StreamEnded(_reason(error)) from None
                for counted in self._counted:
                    counted.bytes_out += len(data)
                self._left.set()
                self._left = trio.Event()
            await self._more.wait()

    async def some_left(self) -> None:
        """Waits until more of what the core has is on its way."""
        await self._left.wait()

    async def close(self) -> None:
        """Resets the stream: a stream that only one side closes is never freed."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            await self._stream.reset()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


@dataclass(slots=True)
class _Waiter:
    done: trio.Event = field(default_factory=trio.Event)
    outcome: bytes | Refused | None = None


class AskingChannel:
    """The end that sends requests."""

    def __init__(self, stream: INetStream, counters: Counters, meters: Meters = ()) -> None:
        self._core = Asker()
        self._wire = _Wire(stream, self._core, counters, meters)
        self._waiters: dict[int, _Waiter] = {}
        self._room = trio.Event()
        self.ended: str | None = None
        self.error: RemoteProtocolError | None = None

    @property
    def usable(self) -> bool:
        """Whether new requests may be sent here."""
        return self.ended is None and not self._core.worn_out

    async def ask(self, data: bytes) -> bytes:
        """One request and its reply; raises `StreamEnded` or `Refused`."""
        while self.usable and not self._core.may_ask(len(data)):
            await self._room.wait()
        if not self.usable:
            raise StreamEnded(self.ended or "its request ids are used up")
        request = self._core.ask(data)
        waiter = self._waiters[request] = _Waiter()
        self._wire.wake()
        try:
            await waiter.done.wait()
        finally:
            del self._waiters[request]
            if not waiter.done.is_set() and self.ended is None:
                self._core.cancel(request)
                self._wire.wake()
                self._tell_room()  # one that had not left is done with that
        if waiter.outcome is None:
            raise StreamEnded(self.ended or "ended")
        if isinstance(waiter.outcome, Refused):
            raise waiter.outcome
        return waiter.outcome

    async def run(self) -> None:
        """Serves until the stream ends; returns then, with every request failed."""
        why = "closed"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wire.write_all)
                while True:
                    self._receive(await self._wire.read())
        except* StreamEnded as ended:
            why = str(_first(ended))
        except* RemoteProtocolError as error:
            why = str(_first(error))
            self.error = _first(error)  # type: ignore[assignment]
        finally:
            self.fail(why)
            await self._wire.close()

    def _receive(self, data: bytes) -> None:
        for event in self._core.receive(data):
            if waiter := self._waiters.get(event.request):
                waiter.outcome = event.data if isinstance(event, Answered) else event.refused
                waiter.done.set()
        self._tell_room()

    def _tell_room(self) -> None:
        """Everybody who waits for room looks again."""
        self._room.set()
        self._room = trio.Event()

    def fail(self, why: str) -> None:
        """Ends every request that waits, at once."""
        if self.ended is None:
            self.ended = why
            for waiter in self._waiters.values():
                waiter.done.set()
            self._tell_room()


def _first(group: BaseExceptionGroup[Exception]) -> Exception:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


@dataclass(frozen=True, slots=True)
class Served:
    """One protocol that is answered here."""

    messages: Messages
    handler: Handler


class AnsweringChannel:
    """The end that answers requests."""

    def __init__(
        self,
        peer: PeerId,
        stream: INetStream,
        counters: Counters,
        served: Served,
        room: trio.CapacityLimiter,
        blame: Callable[[PeerId, Exception], None],
        meters: Meters = (),
    ) -> None:
        self._peer = peer
        self._core = Answerer(min(served.messages.bytes_max, message_bytes_max))
        self._wire = _Wire(stream, self._core, counters, meters)
        self._counters = counters
        self._meters = meters
        self._served = served
        self._room = room
        self._blame = blame
        self._running: dict[int, trio.CancelScope] = {}

    async def run(self) -> None:
        """Serves until the stream ends; then running handlers are cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._wire.write_all)
                while True:
                    for event in self._core.receive(await self._wire.read()):
                        if isinstance(event, Asked):
                            scope = self._running[event.request] = trio.CancelScope()
                            nursery.start_soon(self._serve, event, scope)
                        else:
                            self._running[event.request].cancel()
                    self._wire.wake()
        except* StreamEnded:
            pass
        except* RemoteProtocolError as error:
            self._blame(self._peer, _first(error))
        finally:
            await self._wire.close()

    async def _serve(self, asked: Asked, scope: trio.CancelScope) -> None:
        """Exactly one answer, whatever happens; a slow reader's next request waits for it."""
        refused: Refused = CANCELLED
        with scope:
            try:
                async with self._room:
                    while self._core.unsent_bytes > channel_unsent_bytes_max:
                        await self._wire.some_left()
                    self._counters.requests_served += 1
                    for traffic in self._meters:
                        traffic.requests_in += 1
                    message = self._served.messages.decode(asked.data)
                    reply = await self._served.handler(self._peer, message)
                    self._core.reply(asked.request, self._served.messages.encode(reply))
                    self._wire.wake()
                    return
            except Refused as error:
                refused = error
            except RemoteProtocolError as error:
                self._blame(self._peer, error)
                refused = Refused(ErrorCode.BAD_INPUT, "the request is malformed", str(error))
            finally:
                del self._running[asked.request]
        self._core.refuse(asked.request, refused)
        self._wire.wake()

    async def close(self) -> None:
        """Ends the channel from our side."""
        await self._wire.close()
