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
    """A request, as bytes of the protocol above; answer it once, with `reply` or `refuse`."""

    request: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The asker does not want this reply any more; the request is still to be answered.

    Until then it counts as in flight, so an asker cannot start more work by cancelling. Whatever
    the answer is, CANCELLED is what is sent.
    """

    request: int


class Answerer:
    """One stream's answering end. Feed it what arrives, send what `take` returns.

    A request is in flight until its answer has left: an asker that reads nothing cannot have us
    collect replies without end. `request_bytes_max` is the size of the protocol's largest message.
    """

    def __init__(self, request_bytes_max: int = message_bytes_max) -> None:
        self._request_bytes_max = request_bytes_max
        self._reader = FrameReader(frozenset((FrameKind.REQUEST, FrameKind.CANCEL)))
        self._assembler = Assembler()
        self._outbox = Outbox()
        self._sizes: dict[int, int] = {}  # of every request that is not answered
        self._bytes = 0
        self._cancelled: set[int] = set()  # those of them that nobody waits for
        self._leaving: set[int] = set()  # answered, and not all of the answer has been taken

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
        if frame.request in self._sizes or frame.request in self._leaving:
            raise RemoteProtocolError(WHERE, f"request id {frame.request} twice")
        if frame.total > self._request_bytes_max:
            raise RemoteProtocolError(
                WHERE, f"a request of {frame.total} bytes, at most {self._request_bytes_max}"
            )
        if len(self._sizes) + len(self._leaving) == in_flight_requests_max:
            raise RemoteProtocolError(WHERE, f"over {in_flight_requests_max} requests in flight")
        if self._bytes + frame.total > channel_request_bytes_max:
            raise RemoteProtocolError(WHERE, f"over {channel_request_bytes_max} bytes in flight")
        self._sizes[frame.request] = frame.total
        self._bytes += frame.total

    def _cancel(self, request: int) -> Iterator[Cancelled]:
        if request not in self._sizes or request in self._cancelled:
            return  # our answer and its CANCEL crossed
        if self._assembler.has_begun(request):
            self._assembler.forget(request)
            self.refuse(request, CANCELLED)
        else:
            self._cancelled.add(request)
            yield Cancelled(request)

    def reply(self, request: int, data: bytes) -> None:
        """Queues the reply to `request`, or CANCELLED if it was cancelled meanwhile."""
        if not 0 < len(data) <= message_bytes_max:
            raise LocalProtocolError(f"a reply of {len(data)} bytes")
        if request in self._cancelled:
            self.refuse(request, CANCELLED)
        else:
            self._answer(Message(FrameKind.REPLY, request, data))

    def refuse(self, request: int, refused: Refused) -> None:
        """Queues a refusal of `request`."""
        self._answer(Message(FrameKind.REFUSAL, request, encode_refusal(refused)))

    def _answer(self, message: Message) -> None:
        if message.request not in self._sizes:
            raise LocalProtocolError(f"request {message.request} has been answered")
        self._bytes -= self._sizes.pop(message.request)
        self._cancelled.discard(message.request)
        self._leaving.add(message.request)
        self._outbox.put(message)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that have not left whole."""
        return self._outbox.bytes

    def __bool__(self) -> bool:
        return bool(self._outbox)

    def take(self) -> bytes:
        """The next bytes to send; empty if there are none."""
        data = self._outbox.take()
        self._leaving.difference_update(self._outbox.departed)
        return data
