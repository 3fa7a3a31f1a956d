"""The log: levels by area, lines that are alike, and text from peers that stays on its line."""

import io
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest

from blyan_node import log_areas, logs
from blyan_node.config import Settings
from blyan_node.home import create_home, open_home
from blyan_node.in_use import InUse
from blyan_node.log_areas import AREAS, LogLevels, apply_levels, area_of, parse_log_levels
from blyan_node.logs import COUNTED, Fewer, JsonLines, PlainLines
from blyan_node.parts import App
from blyan_node.reloading import Reloading
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import RemoteProtocolError
from protocols.limits import log_burst_max, log_kinds_max, log_lines_per_s_max


@pytest.fixture
def levels() -> Iterator[None]:
    """Puts the levels of all our loggers back."""
    names = [name for names in log_areas._AREAS.values() for name in names]
    before = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in before.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def log() -> logging.Logger:
    logger = logging.getLogger("blyan_node.services.sync")
    fresh = logging.Logger(logger.name, logging.DEBUG)
    return fresh


def test_levels_are_for_all_and_for_areas() -> None:
    assert parse_log_levels("warning") == LogLevels(logging.WARNING)
    assert parse_log_levels("info, network=debug,rpc=error") == LogLevels(
        logging.INFO, {"network": logging.DEBUG, "rpc": logging.ERROR}
    )
    assert parse_log_levels("sync=debug") == LogLevels(logging.INFO, {"sync": logging.DEBUG})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no level"),
        ("loud", "debug, info, warning, error"),
        ("info,", "no level"),
        ("info,debug", "only the first is for all"),
        ("weather=info", "there are node, network"),
        ("network=", "no level"),
        ("=info", "no area"),
        ("INFO", "no level"),
    ],
)
def test_what_is_wrong_with_a_setting_is_said(text: str, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        parse_log_levels(text)


def test_ten_thousand_settings_have_one_kind_of_error() -> None:
    random = Random(6)
    words = [*AREAS, *log_areas.LEVELS, "=", ",", " ", "=,", "\x00", "é", "info", "x" * 50]
    for _ in range(10_000):
        try:
            parse_log_levels("".join(random.choices(words, k=random.randrange(9))))
        except RemoteProtocolError as error:
            assert error.where == "log_level"


def test_every_logger_of_ours_has_an_area() -> None:
    assert area_of("blyan.network") == area_of("blyan_node.network.dialer") == "network"
    assert area_of("blyan_node.services.gossip") == "sync"
    assert area_of("blyan_node.rpc.server") == "rpc"
    assert area_of("blyan_node.start") == area_of("elsewhere") == area_of("root") == "node"


def test_an_area_has_its_own_level_and_loses_it_again(levels: None) -> None:
    network, sync = (
        logging.getLogger("blyan.network"),
        logging.getLogger("blyan_node.services.sync"),
    )
    apply_levels(parse_log_levels("warning,network=debug"))
    assert network.isEnabledFor(logging.DEBUG)
    assert not sync.isEnabledFor(logging.INFO)
    assert not logging.getLogger("blyan_node.start").isEnabledFor(logging.INFO)
    apply_levels(parse_log_levels("info"))
    assert not network.isEnabledFor(logging.DEBUG)
    assert sync.isEnabledFor(logging.INFO)


def _lines(log: logging.Logger, count: int, *, at: float, what: str = "peer %s") -> list[str]:
    """What is written of `count` lines that are alike, at one moment."""
    out = io.StringIO()
    handler = log.handlers[0] if log.handlers else None
    if handler is None:
        handler = PlainLines(out)
        handler.addFilter(Fewer())
        log.addHandler(handler)
    assert isinstance(handler, PlainLines)
    handler.setStream(out)
    for number in range(count):
        record = log.makeRecord(log.name, logging.INFO, "", 0, what, (f"n{number}",), None)
        record.created = at
        log.handle(record)
    return out.getvalue().splitlines()


def test_lines_that_are_alike_are_cut_and_counted(log: logging.Logger) -> None:
    before = COUNTED.suppressed
    first = _lines(log, 10_000, at=1000.0)
    assert len(first) == log_burst_max
    assert COUNTED.suppressed - before == 10_000 - log_burst_max
    assert len(_lines(log, 1, at=1000.0, what="another %s")) == 1, "others are not cut for it"
    (later,) = _lines(log, 2, at=1000.0 + 1 / log_lines_per_s_max)
    assert f"{10_000 - log_burst_max} like it" in later
    again = _lines(log, 2, at=1000.0 + 10 * log_burst_max / log_lines_per_s_max)
    assert len(again) == 2 and "1 like it" in again[0] and "like it" not in again[1]


def test_a_clock_that_is_put_back_stops_no_log(log: logging.Logger) -> None:
    assert len(_lines(log, log_burst_max, at=1000.0)) == log_burst_max
    assert _lines(log, 1, at=10.0) == []
    assert len(_lines(log, 1, at=10.0 + 1 / log_lines_per_s_max)) == 1


def test_kinds_of_lines_that_are_remembered_are_bounded() -> None:
    fewer = Fewer()
    for number in range(2 * log_kinds_max):
        assert fewer.filter(logging.makeLogRecord({"msg": str(number), "created": 1.0}))
    assert len(fewer._kinds) == log_kinds_max


def test_a_plain_line_is_one_line_whatever_a_peer_sends(log: logging.Logger) -> None:
    forged = "x\n12:00:00 ERROR   node: all is lost\r\x1b[2J\x9b1A"
    (line,) = _lines(log, 1, at=1.0, what=f"%s {forged}")
    assert "\x1b" not in line and "\x9b" not in line and "\r" not in line
    assert "\\x0a12:00:00 ERROR" in line
    assert " sync: " in line


def test_a_json_line_has_its_area_and_its_fields(log: logging.Logger) -> None:
    out = io.StringIO()
    handler = JsonLines(out)
    handler.addFilter(Fewer())
    handler.ready({})
    log.addHandler(handler)
    log.info("peer %s up", "bob", extra={"peer": "bob", "addrs": ["a"], "odd": {1}})
    _, line = out.getvalue().splitlines()
    document = json.loads(line)
    assert document["event"] == "log"
    assert document["area"] == "sync"
    assert document["message"] == "peer bob up"
    assert document["fields"] == {"peer": "bob", "addrs": ["a"], "odd": "{1}"}


def test_lines_are_counted_by_level(log: logging.Logger) -> None:
    before = COUNTED.lines["info"]
    _lines(log, 3, at=5000.0)
    assert COUNTED.lines["info"] == before + 3
    assert logs.COUNTED is COUNTED


@trio_test
async def test_a_reload_changes_the_level_of_a_running_node(levels: None, tmp_path: Path) -> None:
    create_home(tmp_path / "alice", role="main", network=None)
    read = partial(open_home, tmp_path / "alice", rpc=None, network=None, options=Settings())
    app = cast(App, SimpleNamespace(in_use=InUse(read())))
    reloading = Reloading(app, read)
    network = logging.getLogger("blyan.network")
    apply_levels(read().log_level)
    assert not network.isEnabledFor(logging.DEBUG)
    (tmp_path / "alice/config.toml").write_text('log_level = "network=debug"\n')
    assert (await reloading.reload()).live == ("log_level",)
    assert network.isEnabledFor(logging.DEBUG)
    (tmp_path / "alice/config.toml").write_text('log_level = "network=loud"\n')
    assert (await reloading.reload()).live == ()
    assert network.isEnabledFor(logging.DEBUG), "what is wrong changes nothing"
