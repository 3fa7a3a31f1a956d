"""A tally counts what an ingest would store, and stores nothing; the disk's pace."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import limits
from protocols.tensors.manifest import Dtype
from storage.chunks import Chunks
from storage.errors import DiskFull
from storage.pace import FOLDER, write_rate
from storage.store import open_store
from storage.tally import Tally

TENSORS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3 * limits.chunk_bytes)), min_size=1, max_size=6
)


@settings(max_examples=30, deadline=None)
@given(before=TENSORS, after=TENSORS)
def test_it_counts_as_an_ingest_does(tmp_path_factory, before, after) -> None:
    """Whatever is there already, and whatever occurs twice in what is given."""
    with open_store(tmp_path_factory.mktemp("store")) as store:
        for tensors in (before, after):
            tally, rows = Tally(store.chunks), list(store.index.engine.iterate(b""))
            told = [tally.write_tensor("t", Dtype.U8, (size,), _pieces(*t)) for t in tensors
                    for size in [t[1]]]  # fmt: skip
            assert list(store.index.engine.iterate(b"")) == rows
            stored = store.stats().chunk_bytes
            with store.ingest() as ingest:
                entries = [ingest.write_tensor("t", Dtype.U8, (t[1],), _pieces(*t))
                           for t in tensors]  # fmt: skip
            assert told == entries
            assert (tally.new_bytes, tally.reused_bytes) == (ingest.new_bytes, ingest.reused_bytes)
            assert store.stats().chunk_bytes - stored == tally.new_bytes


def _pieces(seed: int, size: int) -> list[bytes]:
    data = random.Random(seed).randbytes(size)
    return [data[at : at + 100_000] for at in range(0, size, 100_000)]


def test_the_pace_of_a_store(tmp_path: Path) -> None:
    """Between the two looks at the clock the engine takes every byte; nothing of it stays."""
    left = tmp_path / FOLDER / "chunks"
    left.mkdir(parents=True)
    (left / "of a process that was killed").touch()
    seen: list[int] = []
    ticks = iter((10.0, 12.0))

    def clock() -> float:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        seen.append(sum(path.stat().st_size for path in files))
        return next(ticks)

    size = 9 * limits.MIB + 7
    assert write_rate(tmp_path, size, clock) == size / 2
    before, after = seen
    assert before < limits.MIB and after - before > size
    assert not list(tmp_path.iterdir())


def test_a_pace_that_cannot_be_measured_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise DiskFull("the disk is full", "nothing was stored")

    monkeypatch.setattr(Chunks, "make_sure_of_room", full)
    with pytest.raises(DiskFull):
        write_rate(tmp_path, limits.MIB)
    assert not list(tmp_path.iterdir())
