"""Canonical msgpack: one value has one encoding, and nothing else is accepted.

Decoders of msgpack take non-minimal integers, duplicate keys and trailing bytes. So `decode_signed`
decodes into a type, encodes the result again and compares: what was signed or hashed has exactly
one form. Messages between peers need no canonical form, only strictness: `Messages` registers them
by number and turns every malformed input into one `RemoteProtocolError`.
"""

from typing import Any, TypeVar

import msgspec

from protocols.errors import LocalProtocolError, RemoteProtocolError

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder(order="sorted")


def encode(value: object) -> bytes:
    """The canonical bytes of `value`: map keys sorted, every number in its smallest form."""
    return _encoder.encode(value)


def decode(data: bytes | memoryview, kind: type[T], *, where: str, bytes_max: int) -> T:
    """Decodes `data` strictly into `kind`; raises `RemoteProtocolError` at `where`."""
    if len(data) > bytes_max:
        raise RemoteProtocolError(where, f"{len(data)} bytes, at most {bytes_max} are allowed")
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(where, str(error)[:200]) from None


def decode_signed(data: bytes, kind: type[T], *, where: str, bytes_max: int) -> T:
    """As `decode`, for what is hashed or signed: refuses every encoding but the canonical one."""
    value = decode(data, kind, where=where, bytes_max=bytes_max)
    if encode(value) != bytes(data):
        raise RemoteProtocolError(where, "not in canonical form")
    return value


class Messages:
    """The message kinds of one protocol, by number.

    On the wire a message is its kind as one byte, then the msgpack of its fields.
    """

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        self._by_kind: dict[int, type[Any]] = {}
        self._kinds: dict[type[Any], int] = {}
        self._bytes_max: dict[int, int] = {}

    def register(self, kind: int, message: type[T], *, bytes_max: int) -> type[T]:
        """Gives `message` its number and its largest size; a number is used once."""
        if kind in self._by_kind or not 0 < kind < 256:
            raise LocalProtocolError(f"{self.protocol}: message kind {kind} is taken or no byte")
        self._by_kind[kind] = message
        self._kinds[message] = kind
        self._bytes_max[kind] = bytes_max
        return message

    @property
    def bytes_max(self) -> int:
        """The size of the largest message, with its kind."""
        return 1 + max(self._bytes_max.values(), default=0)

    def encode(self, message: object) -> bytes:
        """One message as bytes; a message of another protocol or over its size is our bug."""
        kind = self._kinds.get(type(message))
        if kind is None:
            raise LocalProtocolError(f"{type(message).__name__} is not in {self.protocol}")
        data = bytes((kind,)) + encode(message)
        if len(data) > self._bytes_max[kind]:
            raise LocalProtocolError(
                f"{type(message).__name__} of {len(data)} bytes, at most {self._bytes_max[kind]}"
            )
        return data

    def decode(self, data: bytes | memoryview) -> Any:
        """The message in `data`; any malformed input is one `RemoteProtocolError`."""
        if not len(data):
            raise RemoteProtocolError(self.protocol, "empty message")
        message = self._by_kind.get(data[0])
        if message is None:
            raise RemoteProtocolError(self.protocol, f"unknown message kind {data[0]}")
        return decode(
            memoryview(data)[1:],
            message,
            where=f"{self.protocol} {message.__name__}",
            bytes_max=self._bytes_max[data[0]],
        )
