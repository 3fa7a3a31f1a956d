"""One suite for both engines."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.engine import Engine, after_prefix
from storage.leveldb import LevelDBEngine
from storage.memory import MemoryEngine


def test_a_batch_is_read_back(make_engine) -> None:
    engine: Engine = make_engine("a")
    engine.batch([(b"k1", b"v1"), (b"k2", b"")], sync=True)
    engine.batch([(b"k3", b"v3")], [b"k1"])
    assert engine.get(b"k1") is None
    assert engine.get(b"k2") == b""
    assert list(engine.iterate(b"k")) == [(b"k2", b""), (b"k3", b"v3")]


def test_iteration_by_prefix_start_and_direction(make_engine) -> None:
    engine: Engine = make_engine("a")
    keys = [b"a", b"b\x00", b"b\x01", b"b\xff", b"b\xff\xff", b"c"]
    engine.batch([(key, key) for key in keys])
    found = lambda *a, **k: [key for key, _ in engine.iterate(*a, **k)]  # noqa: E731
    assert found(b"") == keys
    assert found(b"b") == keys[1:5]
    assert found(b"b", reverse=True) == keys[4:0:-1]
    assert found(b"b", start=b"b\x01") == keys[2:5]
    assert found(b"b", start=b"b\x01", reverse=True) == keys[2:0:-1]
    assert found(b"b\xff") == keys[3:5]
    assert found(b"b", start=b"a") == keys[1:5]
    assert found(b"b", start=b"c", reverse=True) == keys[4:0:-1]
    assert found(b"\xff") == []


def test_an_iteration_sees_the_rows_of_its_beginning(make_engine) -> None:
    engine: Engine = make_engine("a")
    engine.batch([(b"a", b"1"), (b"b", b"2")])
    rows = engine.iterate(b"")
    first = next(rows)
    engine.batch([(b"c", b"3")], [b"b"])
    assert [first, *rows] == [(b"a", b"1"), (b"b", b"2")]


def test_what_was_written_is_there_after_opening_again(make_engine) -> None:
    make_engine("a").batch([(b"k", b"v")], sync=True)
    assert make_engine("a").get(b"k") == b"v"


OPS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.binary(max_size=3)), max_size=4),
        st.lists(st.binary(min_size=1, max_size=3), max_size=3),
    ),
    max_size=6,
)


@given(OPS, st.binary(max_size=2), st.none() | st.binary(max_size=3), st.booleans())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_both_engines_answer_the_same(tmp_path_factory, ops, prefix, start, reverse) -> None:
    twin = MemoryEngine()
    path: Path = tmp_path_factory.mktemp("twin")
    level = LevelDBEngine(path, buffer_bytes=1 << 16, cache_bytes=1 << 16)
    try:
        for puts, deletes in ops:
            twin.batch(puts, deletes)
            level.batch(puts, deletes)
        same = {"start": start, "reverse": reverse}
        assert list(level.iterate(prefix, **same)) == list(twin.iterate(prefix, **same))
        assert all(level.get(key) == value for key, value in twin.iterate(b""))
    finally:
        level.close()


@given(st.binary(max_size=4), st.binary(max_size=6))
def test_after_prefix_parts_what_begins_with_it_from_what_does_not(prefix, key) -> None:
    end = after_prefix(prefix)
    assert key.startswith(prefix) == (prefix <= key and (end is None or key < end))


def test_a_full_file_system_is_disk_full_and_stops_writing(tmp_path, monkeypatch) -> None:
    import storage.leveldb as leveldb
    from storage.errors import DiskFull

    engine = LevelDBEngine(tmp_path / "a", buffer_bytes=1 << 20, cache_bytes=1 << 20)
    engine.batch([(b"k", b"v")], sync=True)
    told = leveldb._told(leveldb.plyvel.IOError("x.log: No space left on device"), tmp_path)
    assert isinstance(told, DiskFull)
    engine._failed = "No space left on device"
    with pytest.raises(DiskFull, match="restart the node"):
        engine.batch([(b"k2", b"v")])
    assert engine.get(b"k") == b"v"
    engine.close()
