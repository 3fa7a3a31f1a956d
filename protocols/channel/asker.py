"""The side that asks: numbers requests, recognises their replies, forgets cancelled ones."""

from collections.abc import Iterator
from dataclasses import dataclass

from protocols.channel.frames import WHERE, Assembler, FrameKind, FrameReader, Message, Outbox
from protocols.channel.refusal import decode_refusal
from protocols.errors import LocalProtocolError, Refused, RemoteProtocolError
from protocols.limits import (
    channel_request_bytes_max,
    in_flight_requests_max,
    message_bytes_max,
)

_LAST_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Answered:
    """The reply to a request, as bytes of the protocol above."""

    request: int
    data: bytes


@dataclass(frozen=True, slots=True)
class RefusedByPeer:
    """The request was refused."""

    request: int
    refused: Refused


class Asker:
    """One stream's asking end. Feed it what arrives, send what `take` returns."""

    def __init__(self) -> None:
        self._reader = FrameReader(frozenset((FrameKind.REPLY, FrameKind.REFUSAL)))
        self._assembler = Assembler()
        self._outbox = Outbox()
        self._sizes: dict[int, int] = {}  # of every request that is not done
        self._cancelled: set[int] = set()
        self._bytes = 0
        self._last = 0

    @property
    def in_flight(self) -> int:
        """How many requests are not done; cancelled ones count until the peer confirms."""
        return len(self._sizes)

    @property
    def worn_out(self) -> bool:
        """Whether the ids are used up and a new stream is needed."""
        return self._last == _LAST_ID

    def may_ask(self, size: int) -> bool:
        """Whether a request of `size` bytes may be sent now, or must wait for others."""
        return (
            len(self._sizes) < in_flight_requests_max
            and self._bytes + size <= channel_request_bytes_max
        )

    def ask(self, data: bytes) -> int:
        """Queues a request and returns its id."""
        if not self.may_ask(len(data)) or self.worn_out:
            raise LocalProtocolError("a request beyond what may be in flight")
        if not 0 < len(data) <= message_bytes_max:
            raise LocalProtocolError(f"a request of {len(data)} bytes")
        self._last += 1
        self._sizes[self._last] = len(data)
        self._bytes += len(data)
        self._outbox.put(Message(FrameKind.REQUEST, self._last, data))
        return self._last

    def cancel(self, request: int) -> None:
        """The reply to `request` is not wanted any more; one that is done is left alone."""
        if request not in self._sizes or request in self._cancelled:
            return
        if self._outbox.withdraw(request):
            self._done(request)
            return
        self._cancelled.add(request)
        self._outbox.put(Message(FrameKind.CANCEL, request, b""))

    def receive(self, data: bytes) -> Iterator[Answered | RefusedByPeer]:
        """What `data` completes; raises `RemoteProtocolError`, after which the stream is dead."""
        for frame in self._reader.feed(data):
            if frame.request not in self._sizes:
                raise RemoteProtocolError(WHERE, f"a reply to request {frame.request}, not asked")
            message = self._assembler.add(frame)
            if message is None:
                continue
            wanted = message.request not in self._cancelled
            self._done(message.request)
            if message.kind is FrameKind.REPLY:
                if wanted:
                    yield Answered(message.request, message.data)
                continue
            refused = decode_refusal(message.data)
            if wanted:
                yield RefusedByPeer(message.request, refused)

    def _done(self, request: int) -> None:
        self._bytes -= self._sizes.pop(request)
        self._cancelled.discard(request)

    def __bool__(self) -> bool:
        return bool(self._outbox)

    def take(self) -> bytes:
        """The next bytes to send; empty if there are none."""
        return self._outbox.take()
