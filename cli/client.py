"""A client of the node's RPC over a plain blocking socket."""

import signal
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.rpc import codec
from protocols.rpc.codec import Note, Reply

READ_BYTES = 256 * limits.KIB
REQUEST_ID = 1
CANCEL_ID = 2


class NoNode(Exception):
    """There is no node behind the socket, or it went away."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a request; `interrupted` if the user ended it early with Ctrl-C."""

    result: Any
    interrupted: bool


class Client:
    """One connection to a node; use it in a `with` block.

    With `answer_s_max` a node that says nothing for so long is gone.
    """

    def __init__(self, path: str, *, answer_s_max: float | None = None) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines = codec.Lines(limits.rpc_reply_bytes_max)
        self._waiting: list[bytes] = []
        self._asked = False
        self.interrupted = False
        self._socket.settimeout(answer_s_max)
        try:
            self._socket.connect(path)
        except (OSError, ValueError) as error:
            self._socket.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise NoNode(f"no node answers on {path} ({reason})") from None

    @property
    def process(self) -> int | None:
        """The id of the node's process, where the system tells it."""
        peer_credentials = getattr(socket, "SO_PEERCRED", None)
        if peer_credentials is None:
            return None
        raw = self._socket.getsockopt(socket.SOL_SOCKET, peer_credentials, 12)
        return int.from_bytes(raw[:4], sys.byteorder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(
        self,
        method: str,
        params: Mapping[str, object],
        on_note: Callable[[Note], None] = lambda note: None,
    ) -> Answer:
        """Sends one request, hands its notifications to `on_note`, returns its answer.

        Ctrl-C asks the node to end the request and then waits for its answer; a second one gives
        up at once. Raises `Refused` with the node's refusal, `NoNode` when it goes away.
        """
        previous = signal.signal(signal.SIGINT, self._interrupt)
        try:
            self._send(codec.request(REQUEST_ID, method, params))
            self._asked = True
            if self.interrupted:
                self._cancel()
            return self._await_reply(on_note)
        finally:
            signal.signal(signal.SIGINT, previous)

    def _send(self, line: bytes) -> None:
        try:
            self._socket.sendall(line)
        except OSError as error:
            raise self._gone(error) from None

    def _await_reply(self, on_note: Callable[[Note], None]) -> Answer:
        while True:
            message = self._read()
            if isinstance(message, Note):
                if message.params.get("id") == REQUEST_ID:
                    on_note(message)
            elif message.id in (REQUEST_ID, None):
                if message.refused is not None:
                    raise message.refused
                return Answer(message.result, self.interrupted)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if self._asked:
            self._cancel()

    def _cancel(self) -> None:
        with suppress(OSError):  # the reader notices that the node is gone
            self._socket.sendall(codec.request(CANCEL_ID, "rpc.cancel", {"id": REQUEST_ID}))

    def _read(self) -> Note | Reply:
        while not self._waiting:
            try:
                data = self._socket.recv(READ_BYTES)
            except OSError as error:
                raise self._gone(error) from None
            if not data:
                raise self._gone(None)
            try:
                self._waiting = self._lines.feed(data)
            except RemoteProtocolError as error:
                raise NoNode(f"what answers on {self._path} is no node: {error.why}") from None
        try:
            return codec.parse_reply(self._waiting.pop(0))
        except RemoteProtocolError as error:
            raise NoNode(f"what answers on {self._path} is no node: {error.why}") from None

    def _gone(self, error: OSError | None) -> NoNode:
        reason = error.strerror if error is not None else None
        return NoNode(f"the node at {self._path} went away{f' ({reason})' if reason else ''}")
