"""A connection on which several requests and their notifications are under way at once."""

import socket
from collections.abc import Mapping
from typing import Self

from cli.client import READ_BYTES, NoNode
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.rpc import codec
from protocols.rpc.codec import Note, Reply


class Link:
    """Use it in a `with` block; `take` whenever `fileno` has something to read."""

    def __init__(self, path: str, answer_s_max: float) -> None:
        self._path = path
        self._lines = codec.Lines(limits.rpc_reply_bytes_max)
        self._last = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(answer_s_max)
        try:
            self._socket.connect(path)
        except (OSError, ValueError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise NoNode(f"no node answers on {path} ({reason})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """For `select`."""
        return self._socket.fileno()

    def send(self, method: str, params: Mapping[str, object]) -> int:
        """Sends a request; the id of its answer. Raises `NoNode`."""
        self._last += 1
        try:
            self._socket.sendall(codec.request(self._last, method, params))
        except OSError as error:
            raise self._gone(error) from None
        return self._last

    def take(self) -> list[Note | Reply]:
        """What has come; waits for something if nothing has. Raises `NoNode`."""
        try:
            data = self._socket.recv(READ_BYTES)
        except OSError as error:
            raise self._gone(error) from None
        if not data:
            raise self._gone(None)
        try:
            return [codec.parse_reply(line) for line in self._lines.feed(data)]
        except RemoteProtocolError as error:
            raise NoNode(f"what answers on {self._path} is no node: {error.why}") from None

    def _gone(self, error: OSError | None) -> NoNode:
        reason = (error.strerror or str(error)) if error is not None else None
        return NoNode(f"the node at {self._path} went away{f' ({reason})' if reason else ''}")
