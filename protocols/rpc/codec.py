"""JSON-RPC 2.0 on newline-delimited JSON: bytes in, calls and replies out, no I/O.

Participants: a server (the node) and clients on its unix socket. A line is one JSON object or a
batch (an array of objects); it ends with a newline, which JSON never needs inside. Both sides:

    client → {"jsonrpc":"2.0","id":1,"method":"generate.run","params":{…}}
    server → {"jsonrpc":"2.0","method":"generate.token","params":{"id":1,…}}     while it runs
    client → {"jsonrpc":"2.0","id":2,"method":"rpc.cancel","params":{"id":1}}    to end it early
    server → {"jsonrpc":"2.0","id":1,"result":{…}}  or  {…,"error":{"code","message","data"}}

Parameters are named. An id is an integer or a string. Limits come before parsing: the length of a
line (`rpc_line_bytes_max`), the depth of nesting (`rpc_depth_max`), the size of a batch
(`rpc_batch_max`). Whatever a line holds, reading it either works or raises `RemoteProtocolError`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import msgspec

from protocols import limits
from protocols.errors import ErrorCode, Refused, RemoteProtocolError

T = TypeVar("T")
RequestId = int | str

# Strings first, so that a bracket inside one does not count. Possessive, and a quote always
# begins a match (a string may be cut off, even in an escape): linear on any input.
_STRUCTURE = re.compile(rb'"(?:[^"\\]++|\\.?)*+(?:"|$)|[\[{]|[\]}]', re.DOTALL)
_BAD_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError)


class Lines:
    """Cuts a stream of bytes into lines; holds at most one line that is not whole yet."""

    def __init__(self, bytes_max: int = limits.rpc_line_bytes_max) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._bytes_max = bytes_max

    @property
    def partial(self) -> bool:
        """Whether a line has begun that has not ended."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without the empty ones.

        Raises `RemoteProtocolError` for a line that is too long; nothing can follow it.
        """
        self._buffer += data
        lines = []
        while (end := self._buffer.find(b"\n", self._scanned)) >= 0:
            self._refuse_long(end)
            line = bytes(self._buffer[:end]).strip()
            del self._buffer[: end + 1]
            self._scanned = 0
            if line:
                lines.append(line)
        self._scanned = len(self._buffer)
        self._refuse_long(self._scanned)
        return lines

    def _refuse_long(self, length: int) -> None:
        if length > self._bytes_max:
            raise RemoteProtocolError("rpc line", f"longer than {self._bytes_max} bytes")


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    jsonrpc: Literal["2.0"]
    method: str
    params: msgspec.Raw = msgspec.Raw(b"{}")
    id: RequestId | msgspec.UnsetType | None = msgspec.UNSET


class _Named(msgspec.Struct, frozen=True):
    id: RequestId | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One request, or a notification if `id` is None (`wants_reply` is then False)."""

    id: RequestId | None
    method: str
    params: bytes
    wants_reply: bool = True

    def request(self, kind: type[T]) -> T:
        """The parameters as `kind`; raises `Refused` (INVALID_PARAMS) that says which is wrong."""
        try:
            return msgspec.json.decode(self.params, type=kind)
        except _BAD_JSON as error:
            raise Refused(
                ErrorCode.INVALID_PARAMS,
                f"{self.method[:80]}: wrong parameters",
                str(error)[:300].replace("`$.", "`").replace(" - at `$`", ""),
                "`rpc.discover` lists the parameters of every method",
            ) from None


@dataclass(frozen=True, slots=True)
class Invalid:
    """A part of a line that is JSON and no request; `id` is what could be read of one."""

    id: RequestId | None
    why: str

    def refusal(self) -> Refused:
        """What to answer."""
        return Refused(ErrorCode.INVALID_REQUEST, "not a JSON-RPC 2.0 request", self.why)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A line taken apart; the replies of a batch go back as one array."""

    calls: tuple[Call | Invalid, ...]
    batch: bool


def parse(line: bytes) -> Parsed:
    """Takes a line apart; raises `RemoteProtocolError` if it is no JSON or over a limit."""
    check(line, limits.rpc_line_bytes_max)
    if not line.lstrip().startswith(b"["):
        _decode(line, msgspec.Raw)
        return Parsed((_call(line),), batch=False)
    items = _decode(line, list[msgspec.Raw])
    if len(items) > limits.rpc_batch_max:
        raise RemoteProtocolError(
            "rpc batch", f"{len(items)} requests, at most {limits.rpc_batch_max} are allowed"
        )
    if not items:
        return Parsed((Invalid(None, "an empty batch"),), batch=False)
    return Parsed(tuple(_call(bytes(item)) for item in items), batch=True)


def check(line: bytes, bytes_max: int) -> None:
    """Refuses a line that is too long or too deep, before it is parsed."""
    if len(line) > bytes_max:
        raise RemoteProtocolError("rpc line", f"longer than {bytes_max} bytes")
    depth = 0
    for match in _STRUCTURE.finditer(line):
        mark = line[match.start()]
        if mark in b"[{":
            depth += 1
            if depth > limits.rpc_depth_max:
                raise RemoteProtocolError("rpc line", f"nested deeper than {limits.rpc_depth_max}")
        elif mark in b"]}":
            depth -= 1


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except _BAD_JSON as error:
        raise RemoteProtocolError("rpc line", str(error)[:200]) from None


def _call(data: bytes) -> Call | Invalid:
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
    except _BAD_JSON as error:
        return Invalid(_readable_id(data), str(error)[:200])
    params = bytes(envelope.params)
    if not params.startswith(b"{"):
        return Invalid(_readable_id(data), "`params` must be an object: parameters are named")
    if envelope.id is msgspec.UNSET:
        return Call(None, envelope.method, params, wants_reply=False)
    return Call(envelope.id, envelope.method, params)


def _readable_id(data: bytes) -> RequestId | None:
    try:
        return msgspec.json.decode(data, type=_Named).id
    except _BAD_JSON:
        return None


# What the server writes ---------------------------------------------------------------------


def result(request_id: RequestId | None, value: object) -> bytes:
    """A reply, without its newline."""
    return msgspec.json.encode({"jsonrpc": "2.0", "id": request_id, "result": value})


def error(request_id: RequestId | None, refused: Refused) -> bytes:
    """An error reply, without its newline."""
    return msgspec.json.encode({"jsonrpc": "2.0", "id": request_id, "error": error_object(refused)})


def error_object(refused: Refused) -> dict[str, Any]:
    """`{"code","message","data"}`: the message says what and why, `data` what it is about."""
    data: dict[str, Any] = dict(refused.data)
    data |= {"why": refused.why} if refused.why else {}
    data |= {"next": refused.next} if refused.next else {}
    message = ": ".join(part for part in (refused.what, refused.why) if part)
    return {"code": int(refused.code), "message": message, "data": data}


def notification(method: str, request_id: RequestId | None, params: msgspec.Struct) -> bytes:
    """One message of a stream: `params` with the id of the request that it belongs to."""
    fields = {"id": request_id, **msgspec.structs.asdict(params)}
    return msgspec.json.encode({"jsonrpc": "2.0", "method": method, "params": fields})


def batch(replies: list[bytes]) -> bytes:
    """The replies of a batch as one array."""
    return b"[" + b",".join(replies) + b"]"


# What the client writes and reads --------------------------------------------------------------


def request(request_id: RequestId, method: str, params: Mapping[str, object]) -> bytes:
    """A request as one line with its newline."""
    document = {"jsonrpc": "2.0", "id": request_id, "method": method, "params": params}
    return msgspec.json.encode(document) + b"\n"


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a request: a result, or the refusal that came instead."""

    id: RequestId | None
    result: Any
    refused: Refused | None


@dataclass(frozen=True, slots=True)
class Note:
    """One message of a stream."""

    method: str
    params: dict[str, Any]


class _Error(msgspec.Struct, frozen=True):
    code: int
    message: str
    data: dict[str, Any] = {}


class _Incoming(msgspec.Struct, frozen=True):
    jsonrpc: Literal["2.0"]
    id: RequestId | None = None
    method: str | None = None
    params: dict[str, Any] = {}
    result: Any = None
    error: _Error | None = None


def parse_reply(line: bytes) -> Reply | Note:
    """What the server wrote on one line; raises `RemoteProtocolError` if it is neither."""
    check(line, limits.rpc_reply_bytes_max)
    message = _decode(line, _Incoming)
    if message.method is not None:
        return Note(message.method, message.params)
    if message.error is None:
        return Reply(message.id, message.result, None)
    return Reply(message.id, None, _refused(message.error))


def _refused(error: _Error) -> Refused:
    data = dict(error.data)
    why, following = str(data.pop("why", "")), str(data.pop("next", ""))
    what = error.message.removesuffix(f": {why}") if why else error.message
    try:
        code = ErrorCode(error.code)
    except ValueError:  # a newer node knows more codes
        code = ErrorCode.INTERNAL
    return Refused(code, what, why, following, data)
