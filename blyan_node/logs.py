"""Log lines: plain for people, or one JSON object a line for programs.

Until the node is ready its JSON lines are kept back, so that the first line of `start --json` is
the readiness line; if it never gets ready, they are written when the process ends. Of lines that
are alike, as a peer can cause them by the thousand, only some are written, and the next that is
says how many were not. A peer's text cannot make a second line, nor move a terminal's cursor.
"""

import json
import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from blyan_node.log_areas import LogLevels, apply_levels, area_of
from protocols.limits import log_burst_max, log_kinds_max, log_lines_per_s_max

KEPT_MAX = 1_000
# What libraries say about each connection is for their own developers.
_NOISY = ("libp2p", "multiaddr", "async_service", "asyncio", "urllib3")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "more"}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
_CONTROL_IN_LINES = {code: shown for code, shown in _CONTROL.items() if code != ord("\n")}


@dataclass
class Counted:
    """Lines of this process by level, and those that were left out."""

    lines: Counter[str] = field(default_factory=Counter)
    suppressed: int = 0


COUNTED = Counted()
"""There is one log in a process, as `logging` has it."""


@dataclass
class _Alike:
    """Lines from one place in the code. `room` lines may follow at once."""

    room: float = log_burst_max
    at: float = 0.0
    left_out: int = 0


class Fewer(logging.Filter):
    """Lets `log_burst_max` lines of one kind through, then `log_lines_per_s_max` in a second.

    Of one kind are lines with the same words around their values, at the same level: their number
    is that of the places that log, whatever peers send.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, int, str], _Alike] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether `record` is written; notes in it how many before it were not."""
        kind = (record.name, record.levelno, str(record.msg))
        if kind not in self._kinds and len(self._kinds) >= log_kinds_max:
            del self._kinds[next(iter(self._kinds))]
        alike = self._kinds.setdefault(kind, _Alike(at=record.created))
        passed = max(0.0, record.created - alike.at)
        alike.room = min(log_burst_max, alike.room + passed * log_lines_per_s_max)
        alike.at = record.created
        if alike.room < 1:
            alike.left_out += 1
            COUNTED.suppressed += 1
            return False
        alike.room -= 1
        record.more, alike.left_out = alike.left_out, 0
        COUNTED.lines[record.levelname.lower()] += 1
        return True


class _Plain(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(area)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.area = area_of(record.name)
        record.message = record.message.translate(_CONTROL) + _more(record)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return super().formatException(ei).translate(_CONTROL_IN_LINES)


def _more(record: logging.LogRecord) -> str:
    more = getattr(record, "more", 0)
    return f" (and {more} like it before, left out)" if more else ""


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, object] = {
            "event": "log",
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "area": area_of(record.name),
            "logger": record.name,
            "message": record.getMessage(),
            "fields": {k: v for k, v in vars(record).items() if k not in _STANDARD},
        }
        if more := getattr(record, "more", 0):
            document["left_out"] = more
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


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


class PlainLines(logging.StreamHandler[TextIO]):
    """Writes lines for people to `stream`."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.setFormatter(_Plain())


def start_logging(levels: LogLevels, *, as_json: bool) -> JsonLines | None:
    """Sets up the process's logging; with `as_json` returns the handler that says "ready"."""
    handler: JsonLines | PlainLines
    handler = JsonLines(sys.stdout) if as_json else PlainLines(sys.stderr)
    handler.addFilter(Fewer())
    logging.Formatter.converter = time.localtime
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    apply_levels(levels)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return handler if isinstance(handler, JsonLines) else None
