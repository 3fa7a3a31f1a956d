"""One blocking question to a node's RPC, for programs that watch daemons from outside."""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.rpc import codec
from protocols.rpc.codec import Reply


def ask(path: Path, method: str, params: Mapping[str, object], *, timeout_s: float = 10.0) -> Any:
    """The result of one call; raises `OSError` if no node answers in time, `Refused` if it does."""
    lines = codec.Lines(limits.rpc_reply_bytes_max)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
        link.settimeout(timeout_s)
        link.connect(str(path))
        link.sendall(codec.request(1, method, params))
        while data := link.recv(64 * limits.KIB):
            try:
                messages = [codec.parse_reply(line) for line in lines.feed(data)]
            except RemoteProtocolError as error:
                raise ConnectionError(f"what answers on {path} is no node: {error.why}") from None
            for message in messages:
                if isinstance(message, Reply):
                    if message.refused is not None:
                        raise message.refused
                    return message.result
    raise ConnectionError(f"the node at {path} closed the connection")
