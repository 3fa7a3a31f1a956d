"""The side that answers: puts requests together, sends each exactly one reply or refusal."""

from collections.abc import Iterator
from dataclasses import dataclass

from protocols.channel.frames import (
    WHERE,
    Assembler,
    Frame,
    FrameKind,
    FrameReader,
    Message,
    Outbox,
)
from protocols.channel.refusal import CANCELLED, encode_refusal
from protocols.errors import LocalProtocolError, Refused, RemoteProtocolError
from protocols.limits import (
    channel_request_bytes_max,
    in_flight_requests_max,
    message_bytes_max,
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as bytes of the protocol above; answer it with `reply` or `refuse`."""

    request: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The asker does not want this reply any more; answering it is allowed and does nothing."""

    request: int


class Answerer:
    """One stream's answering end. Feed it what arrives, send what `take` returns."""

    def __init__(self) -> None:
        self._reader = FrameReader(frozenset((FrameKind.REQUEST, FrameKind.CANCEL)))
        self._assembler = Assembler()
        self._outbox = Outbox()
        self._sizes: dict[int, int] = {}  # of every request that is not answered
        self._bytes = 0
        self._cancelled: set[int] = set()  # answered with a refusal because of a CANCEL

    def receive(self, data: bytes) -> Iterator[Asked | Cancelled]:
        """What `data` completes; raises `RemoteProtocolError`, after which the stream is dead."""
        for frame in self._reader.feed(data):
            if frame.kind is FrameKind.CANCEL:
                yield from self._cancel(frame.request)
                continue
            if not self._assembler.has_begun(frame.request):
                self._begin(frame)
            message = self._assembler.add(frame)
            if message is not None:
                yield Asked(message.request, message.data)

    def _begin(self, frame: Frame) -> None:
        if frame.request in self._sizes or frame.request in self._cancelled:
            raise RemoteProtocolError(WHERE, f"request id {frame.request} twice")
        if len(self._sizes) == in_flight_requests_max:
            raise RemoteProtocolError(WHERE, f"over {in_flight_requests_max} requests in flight")
        if self._bytes + frame.total > channel_request_bytes_max:
            raise RemoteProtocolError(WHERE, f"over {channel_request_bytes_max} bytes in flight")
        self._sizes[frame.request] = frame.total
        self._bytes += frame.total

    def _cancel(self, request: int) -> Iterator[Cancelled]:
        if request not in self._sizes:
            return  # our answer and its CANCEL crossed
        whole = not self._assembler.has_begun(request)
        self._assembler.forget(request)
        self.refuse(request, CANCELLED)
        if whole:
            self._cancelled.add(request)
            yield Cancelled(request)

    def reply(self, request: int, data: bytes) -> None:
        """Queues the reply to `request`; nothing happens if it was cancelled meanwhile."""
        if not 0 < len(data) <= message_bytes_max:
            raise LocalProtocolError(f"a reply of {len(data)} bytes")
        self._answer(Message(FrameKind.REPLY, request, data))

    def refuse(self, request: int, refused: Refused) -> None:
        """Queues a refusal of `request`; nothing happens if it was cancelled meanwhile."""
        self._answer(Message(FrameKind.REFUSAL, request, encode_refusal(refused)))

    def _answer(self, message: Message) -> None:
        if message.request in self._cancelled:
            self._cancelled.discard(message.request)
            return
        if message.request not in self._sizes:
            raise LocalProtocolError(f"request {message.request} has been answered")
        self._bytes -= self._sizes.pop(message.request)
        self._outbox.put(message)

    def __bool__(self) -> bool:
        return bool(self._outbox)

    def take(self) -> bytes:
        """The next bytes to send; empty if there are none."""
        return self._outbox.take()
