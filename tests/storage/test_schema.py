"""Stores of every schema so far open, whole; what is written now is what the newest of them has."""

import io
import re
import tarfile
from pathlib import Path

import pytest

from blyan_node.testing.old_stores import CURSOR, WEIGHTS, fill, kinds, pack_up
from protocols.errors import Refused
from protocols.ids import Subject
from storage import keys
from storage.fsck import check
from storage.leveldb import LevelDBEngine
from storage.pins import Pin
from storage.schema import SCHEMA_VERSION
from storage.store import Store, open_store

STORES = Path(__file__).parent / "stores"
EVERY = sorted(STORES.glob("schema-*.tar.gz"))


def _unpacked(archive: bytes | Path, data: Path) -> Path:
    packed = archive if isinstance(archive, bytes) else archive.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(data, filter="data")
    return data


def _rows(store: Store) -> dict[bytes, bytes]:
    """Every row of both databases but the name of the log, which is drawn anew for every store."""
    rows = dict(store.index.engine.iterate(b"")) | dict(store.chunks.data.iterate(b""))
    del rows[keys.SCHEMA_KEY]
    return rows


def test_there_is_a_store_of_every_schema() -> None:
    numbers = [int(re.findall(r"\d+", path.name)[0]) for path in EVERY]
    assert numbers == list(range(1, SCHEMA_VERSION + 1)), "python -m blyan_node.testing.old_stores"


@pytest.mark.parametrize("archive", EVERY, ids=lambda path: path.name)
def test_the_store_of_an_earlier_release_opens_and_has_everything(
    archive: Path, tmp_path: Path
) -> None:
    with open_store(tmp_path / "now") as store:
        named = fill(store)
    with open_store(_unpacked(archive, tmp_path / "data")) as store:
        assert store.schema.version == SCHEMA_VERSION
        assert check(store).bad == []
        assert store.stats().accepted == 7 and store.stats().staged == 1
        heads = store.heads(named["model"])
        assert heads[Subject("embed")] == named["embed"]
        assert heads[Subject("layer0.expert0")] == named["better"]
        assert set(store.releases(named["model"])) == {named["release"], named["second"]}
        assert set(store.successors(named["expert"])) == {named["better"], named["other"]}
        assert store.staged(named["model"]) == [named["staged"]]
        assert store.cursor(CURSOR[0], CURSOR[1]) == CURSOR[2]
        assert store.pins.of(named["model"]) == {Pin.PUBLISHED}
        assert store.wanted() == [named["expert"]]
        ((_, pieces),) = store.read_body(named["better"])
        assert b"".join(pieces) == WEIGHTS
        store.pack(named["better"])


def test_what_is_written_now_is_what_the_store_of_this_schema_has(tmp_path: Path) -> None:
    """A row that changes its form without a new version would be misread by older programs."""
    with open_store(_unpacked(EVERY[-1], tmp_path / "then")) as then:
        before, tags = _rows(then), kinds(then)
    with open_store(tmp_path / "now") as now:
        fill(now)
        assert _rows(now) == before
    families = {family.tag for family in (*keys.INDEX_FAMILIES, keys.DATA)}
    transient = {keys.LEAVING.tag}  # between two writes only
    assert families - tags == transient, "blyan_node/testing/old_stores.py lacks a kind of row"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (keys.SCHEMA_VALUE.pack(SCHEMA_VERSION + 1, bytes(16)), "a newer blyan-node wrote it"),
        (keys.SCHEMA_VALUE.pack(SCHEMA_VERSION + 1, bytes(16)) + b"more", "a newer blyan-node"),
        (keys.SCHEMA_VALUE.pack(0, bytes(16)), "none of ours"),
        (b"", "none of ours"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_is_changed(
    value: bytes, why: str, tmp_path: Path
) -> None:
    data = _unpacked(EVERY[-1], tmp_path / "data")
    index = LevelDBEngine(data / "index", buffer_bytes=1 << 20, cache_bytes=1 << 20)
    index.batch([(keys.SCHEMA_KEY, value)])
    before = list(index.iterate(b""))
    index.close()
    with pytest.raises(Refused, match=why) as refused:
        open_store(data)
    assert "nothing was changed" in refused.value.next and "--home" in refused.value.next
    index = LevelDBEngine(data / "index", buffer_bytes=1 << 20, cache_bytes=1 << 20)
    assert list(index.iterate(b"")) == before
    index.close()


def test_a_store_is_packed_up_whole(tmp_path: Path) -> None:
    with open_store(tmp_path / "data") as store:
        fill(store)
        rows = _rows(store)
    with open_store(_unpacked(pack_up(tmp_path / "data"), tmp_path / "again")) as store:
        assert _rows(store) == rows
