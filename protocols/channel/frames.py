"""Bytes to frames, frames to messages, messages to frames."""

import enum
import struct
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from protocols.errors import RemoteProtocolError
from protocols.limits import (
    KIB,
    frame_bytes_max,
    incomplete_messages_max,
    message_bytes_max,
    write_bytes_max,
)

WHERE = "channel"
HEADER = struct.Struct(">BIII")  # kind, request id, length of the message, length of the piece
PIECE_BYTES = frame_bytes_max - KIB  # leaves room for the headers below, so one record holds it


class FrameKind(enum.IntEnum):
    """What the message that a frame belongs to is."""

    REQUEST = 1
    CANCEL = 2
    REPLY = 3
    REFUSAL = 4


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of a message of `total` bytes."""

    kind: FrameKind
    request: int
    total: int
    piece: bytes


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message."""

    kind: FrameKind
    request: int
    data: bytes


class FrameReader:
    """Cuts a byte stream into frames; checks every length before anything is kept."""

    def __init__(self, kinds: frozenset[FrameKind]) -> None:
        self._kinds = {int(kind): kind for kind in kinds}
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete now; raises `RemoteProtocolError`."""
        self._buffer += data
        while (frame := self._next()) is not None:
            yield frame

    @property
    def buffered(self) -> int:
        """Bytes of a frame that has begun and not ended."""
        return len(self._buffer)

    def _next(self) -> Frame | None:
        if len(self._buffer) < HEADER.size:
            return None
        number, request, total, length = HEADER.unpack_from(self._buffer)
        kind = self._kinds.get(number)
        if kind is None:
            raise RemoteProtocolError(WHERE, f"unexpected frame kind {number}")
        if request == 0:
            raise RemoteProtocolError(WHERE, "request id 0")
        _check_lengths(kind, total, length)
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        piece = bytes(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return Frame(kind, request, total, piece)


def _check_lengths(kind: FrameKind, total: int, length: int) -> None:
    if kind is FrameKind.CANCEL:
        if total or length:
            raise RemoteProtocolError(WHERE, "a CANCEL with content")
        return
    if not 0 < total <= message_bytes_max:
        raise RemoteProtocolError(
            WHERE, f"a message of {total} bytes, at most {message_bytes_max} are allowed"
        )
    if not 0 < length <= min(total, frame_bytes_max):
        raise RemoteProtocolError(WHERE, f"a piece of {length} bytes of a message of {total}")


@dataclass
class _Incomplete:
    kind: FrameKind
    total: int
    data: bytearray = field(default_factory=bytearray)


class Assembler:
    """Puts pieces together; at most `incomplete_messages_max` messages are incomplete at once."""

    def __init__(self) -> None:
        self._incomplete: dict[int, _Incomplete] = {}

    def add(self, frame: Frame) -> Message | None:
        """The message that `frame` completes, if it does; raises `RemoteProtocolError`."""
        begun = self._incomplete.get(frame.request)
        if begun is None:
            if len(frame.piece) == frame.total:
                return Message(frame.kind, frame.request, frame.piece)
            if len(self._incomplete) == incomplete_messages_max:
                raise RemoteProtocolError(
                    WHERE, f"more than {incomplete_messages_max} messages begun at once"
                )
            begun = self._incomplete[frame.request] = _Incomplete(frame.kind, frame.total)
        elif (begun.kind, begun.total) != (frame.kind, frame.total):
            raise RemoteProtocolError(WHERE, f"pieces of request {frame.request} do not fit")
        begun.data += frame.piece
        if len(begun.data) > begun.total:
            raise RemoteProtocolError(WHERE, f"request {frame.request} is longer than it said")
        if len(begun.data) < begun.total:
            return None
        del self._incomplete[frame.request]
        return Message(frame.kind, frame.request, bytes(begun.data))

    def has_begun(self, request: int) -> bool:
        """Whether pieces of `request` are here and others are not."""
        return request in self._incomplete

    def forget(self, request: int) -> None:
        """Drops the pieces of `request`."""
        self._incomplete.pop(request, None)


@dataclass
class _Leaving:
    message: Message
    sent: int = 0


class Outbox:
    """Messages on their way out: small ones first, large ones piece by piece in turn."""

    def __init__(self) -> None:
        self._small: deque[Message] = deque()
        self._turns: deque[_Leaving] = deque()
        self._waiting: deque[Message] = deque()
        self.bytes = 0  # of messages that have not left whole
        self.departed: list[int] = []  # requests whose message left whole with the last `take`

    def put(self, message: Message) -> None:
        """Queues a message; how many there may be is the asker's and the answerer's matter."""
        self.bytes += len(message.data)
        if len(message.data) <= PIECE_BYTES:
            self._small.append(message)
        elif len(self._turns) < incomplete_messages_max:
            self._turns.append(_Leaving(message))
        else:
            self._waiting.append(message)

    def withdraw(self, request: int) -> bool:
        """Takes a message back; False if some of it has left, or nothing of it was here."""
        for queue in (self._small, self._waiting):
            for message in queue:
                if message.request == request:
                    queue.remove(message)
                    self.bytes -= len(message.data)
                    return True
        for leaving in self._turns:
            if leaving.message.request == request:
                self._turns.remove(leaving)
                self.bytes -= len(leaving.message.data)
                self._let_next_begin()
                return leaving.sent == 0
        return False

    def __bool__(self) -> bool:
        return bool(self._small or self._turns)

    def take(self) -> bytes:
        """The next bytes for the stream, about `write_bytes_max`; empty if there are none."""
        out = bytearray()
        self.departed.clear()
        while self and len(out) < write_bytes_max:
            while self._small and len(out) < write_bytes_max:
                message = self._small.popleft()
                out += _header(message, len(message.data))
                out += message.data
                self._depart(message)
            if self._turns:
                self._take_piece(out)
        return bytes(out)

    def _take_piece(self, out: bytearray) -> None:
        leaving = self._turns.popleft()
        message = leaving.message
        piece = memoryview(message.data)[leaving.sent : leaving.sent + PIECE_BYTES]
        out += _header(message, len(piece))
        out += piece
        leaving.sent += len(piece)
        if leaving.sent < len(message.data):
            self._turns.append(leaving)
        else:
            self._depart(message)
            self._let_next_begin()

    def _depart(self, message: Message) -> None:
        self.bytes -= len(message.data)
        self.departed.append(message.request)

    def _let_next_begin(self) -> None:
        if self._waiting:
            self._turns.append(_Leaving(self._waiting.popleft()))


def _header(message: Message, length: int) -> bytes:
    return HEADER.pack(message.kind, message.request, len(message.data), length)
