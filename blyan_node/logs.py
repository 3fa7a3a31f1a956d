"""Log lines: plain for people, or one JSON object a line for programs.

Until the node is ready its JSON lines are kept back, so that the first line of `start --json` is
the readiness line; if it never gets ready, they are written when the process ends.
"""

import json
import logging
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import TextIO

KEPT_MAX = 1_000
# What libraries say about each connection is for their own developers.
_NOISY = ("libp2p", "multiaddr", "async_service", "asyncio", "urllib3")


class _Plain(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document = {
            "event": "log",
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)


class JsonLines(logging.Handler):
    """Writes JSON lines to `stream`, the readiness line first."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._kept: deque[str] | None = deque(maxlen=KEPT_MAX)
        self.setFormatter(_Json())

    def emit(self, record: logging.LogRecord) -> None:
        """Writes or keeps one line."""
        line = self.format(record)
        if self._kept is not None:
            self._kept.append(line)
        else:
            self._write(line)

    def ready(self, document: Mapping[str, object]) -> None:
        """Writes the readiness line, then what was kept."""
        self.acquire()
        try:
            self._write(json.dumps({"event": "ready", **document}))
            self._write_kept()
        finally:
            self.release()

    def close(self) -> None:
        """Writes what is still kept."""
        self._write_kept()
        super().close()

    def _write_kept(self) -> None:
        kept, self._kept = self._kept, None
        for line in kept or ():
            self._write(line)

    def _write(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # nobody reads the log any more; the node goes on
            pass


def start_logging(*, as_json: bool, verbose: bool) -> JsonLines | None:
    """Sets up the process's logging; with `as_json` returns the handler that says "ready"."""
    handler: logging.Handler
    if as_json:
        handler = JsonLines(sys.stdout)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Plain())
    logging.Formatter.converter = time.localtime
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("blyan_node").setLevel(logging.DEBUG if verbose else logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return handler if isinstance(handler, JsonLines) else None
