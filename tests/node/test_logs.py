"""Log lines for programs: JSON, the readiness line first, nothing lost before it."""

import io
import json
import logging

import pytest

from blyan_node.logs import JsonLines, PlainLines


@pytest.fixture
def log() -> logging.Logger:
    logger = logging.getLogger("test of logs")
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


def test_the_readiness_line_is_the_first(log: logging.Logger) -> None:
    out = io.StringIO()
    handler = JsonLines(out)
    log.handlers = [handler]
    log.info("before %d", 1)
    assert not out.getvalue()
    handler.ready({"peer_id": "alice"})
    log.warning("after")
    ready, before, after = map(json.loads, out.getvalue().splitlines())
    assert ready == {"event": "ready", "peer_id": "alice"}
    assert (before["message"], before["level"]) == ("before 1", "info")
    assert (after["message"], after["level"]) == ("after", "warning")


def test_a_node_that_never_gets_ready_still_says_why(log: logging.Logger) -> None:
    out = io.StringIO()
    handler = JsonLines(out)
    log.handlers = [handler]
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("it broke\nin two lines")
    handler.close()
    (line,) = map(json.loads, out.getvalue().splitlines())
    assert line["message"] == "it broke\nin two lines"
    assert "ValueError: why" in line["exception"]


def test_a_log_that_nobody_reads_ends_nothing(log: logging.Logger) -> None:
    out = io.StringIO()
    handler = JsonLines(out)
    handler.ready({})
    log.handlers = [handler]
    out.close()
    log.info("to nobody")


def test_what_a_peer_sent_moves_no_cursor_even_in_a_traceback(log: logging.Logger) -> None:
    out = io.StringIO()
    log.handlers = [PlainLines(out)]
    log.info("peer %s", "mallory\n12:00:00 INFO node: all is well\x1b[2J\x9b2J")
    try:
        raise ValueError("bad \x1b]0;title\x07\rname")
    except ValueError:
        log.exception("it broke")
    line, *rest = out.getvalue().splitlines()
    assert "mallory\\x0a12:00:00 INFO" in line
    assert rest[0].endswith("it broke") and rest[1].startswith("Traceback")
    assert rest[-1] == "ValueError: bad \\x1b]0;title\\x07\\x0dname"
    assert not set(out.getvalue()) & {"\x1b", "\r", "\x9b", "\x07"}
