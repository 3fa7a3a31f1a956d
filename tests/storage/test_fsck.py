"""What fsck finds, and what is left after a repair."""

import json
import random
from pathlib import Path

import pytest

from blyan_node.offline import block_drop, fsck
from blyan_node.testing.blocks import Author
from blyan_node.testing.writing import write
from protocols.dag.heads import heads_of
from protocols.errors import Refused
from protocols.ids import cid_text
from storage import keys
from storage.fsck import check
from storage.leveldb import LevelDBEngine
from storage.pins import Pin
from storage.repair import repair
from storage.store import Store, open_store


def life(store: Store):
    """A model of two parts with an update, and a second model that is staged only."""
    author = Author("alice")
    made = author.publish()
    update = author.update(made[2], b"new weights")
    write(store, [*made, update])
    staged = author.publish("staged")[:-1]
    write(store, staged)
    store.pin(*(m.id for m in made), update.id, reason=Pin.PUBLISHED)
    store.set_cursor(Author("bob").identity.peer_id, bytes(16), 5)
    return made, update, staged


def test_a_store_that_lived_is_clean(make_store) -> None:
    store = make_store()
    life(store)
    report = check(store)
    assert report.ok and report.blocks == 8 and report.chunks == 7
    assert check(make_store()).ok


FAMILIES = [f for f in keys.INDEX_FAMILIES if f not in (keys.LEAVING, keys.CURSOR, keys.PIN)]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.tag.decode())
@pytest.mark.parametrize("how", ["gone", "flipped"])
def test_every_row_of_the_index_is_checked_and_mended(make_store, family, how, make_engine) -> None:
    first = make_store()
    life(first)
    rows = list(first.index.engine.iterate(family.prefix()))
    if isinstance(make_engine("index"), LevelDBEngine):
        rows = rows[:1]  # opening it again and again takes long
    assert rows
    for key, value in rows:
        if how == "flipped" and not value:
            continue
        store = make_store()
        engine = store.index.engine
        before = dict(engine.iterate(b""))
        if how == "gone":
            engine.batch([], [key])
        else:
            at = len(value) // 2
            engine.batch([(key, value[:at] + bytes((value[at] ^ 1,)) + value[at + 1 :])])
        store = make_store()
        report = check(store)
        if family in (keys.AUTHOR, keys.PAST_HEAD, keys.ROOT, keys.SUBJECTS) and report.ok:
            # A larger number of an author is allowed, and so are roots that nobody asks for.
            assert how == "flipped" or family is not keys.AUTHOR
        else:
            assert not report.ok, (key, value)
        repair(store, report)
        mended = make_store()
        assert check(mended).ok, check(mended).bad
        mended.index.engine.batch(list(before.items()), [
            k for k, _ in mended.index.engine.iterate(b"") if k not in before
        ])  # fmt: skip


def test_a_broken_block_goes_with_what_depends_on_it_and_comes_back(make_store) -> None:
    store = make_store()
    made, update, _staged = life(store)
    key = keys.BLOCK.key(made[2].id)
    value = bytearray(store.index.engine.get(key))
    value[60] ^= 1
    store.index.engine.batch([(key, bytes(value))])
    name = store.log_id
    repair(store, check(store))
    after = make_store()
    assert check(after).ok
    assert after.log_id != name and after.cursor(Author("bob").identity.peer_id, bytes(16)) == 0
    assert after.block(made[2].id) is None and after.block(update.id) is None
    assert {made[2].id, update.id} <= set(after.wanted())
    write(after, [*made, update])
    assert after.heads(made[0].id) == heads_of(made[0].id, after).heads
    assert update.id in after.heads(made[0].id).values()
    assert check(after).ok


def test_a_broken_chunk_is_dropped_and_its_block_is_wanted(make_store) -> None:
    store = make_store()
    made, *_ = life(store)
    name = made[1].chunks[0][0]
    place = keys.DATA.key(store.chunks.find(name)[0], name)
    store.chunks.data.batch([(place, b"other bytes")])
    pins = store.pins.of(made[1].id)
    assert pins
    report = check(store)
    assert report.bad_chunks == {name} and report.incomplete == {made[1].id}
    repair(store, report)
    after = make_store()
    assert check(after).ok and after.wanted() == [made[1].id]
    after.put_chunks(made[1].chunks)
    after.unpin(made[1].id, reason=Pin.WANTED)
    assert after.wanted() == [] and check(after).ok
    assert after.pins.of(made[1].id) == pins - {Pin.WANTED}  # what it was kept for it still is


def test_stray_bytes_are_found_and_taken_in(make_store) -> None:
    store = make_store()
    life(store)
    key, _ = next(iter(store.index.engine.iterate(keys.CHUNK.prefix())))
    store.index.engine.batch([(b"zzz", b"")], [key])
    report = check(store)
    assert {bad.what for bad in report.bad} >= {"chunk", "index"}
    repair(store, report)
    after = make_store()
    assert check(after).ok and after.stats().chunks == 7


def run(capsys, home: Path, **options: bool) -> tuple[int, dict]:
    code = fsck(home, repair=options.get("repair", False), as_json=True)
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_command_finds_drops_and_mends(tmp_path, capsys) -> None:
    data = tmp_path / "data"
    with open_store(data) as store:
        made, update, _ = life(store)
        with pytest.raises(Refused, match="is in use"):
            fsck(tmp_path, repair=False, as_json=True)
    assert run(capsys, tmp_path) == (0, {"ok": True, "blocks": 8, "chunks": 7, "bad": []})
    with pytest.raises(Refused, match="no such block"):
        block_drop(tmp_path, cid_text(made[0].manifest_id), as_json=True)
    assert block_drop(tmp_path, cid_text(update.id), as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == {"block": cid_text(update.id), "bytes": 11}
    code, found = run(capsys, tmp_path)
    assert code == 1 and found["bad"][0]["block"] == cid_text(update.id)
    assert "layer0.expert0" in found["bad"][0]["why"]
    code, found = run(capsys, tmp_path, repair=True)
    assert code == 0 and found["ok"] and len(found["repaired"]) == 1
    with open_store(data) as store:
        assert store.wanted() == [update.id]


def test_a_flipped_byte_in_a_file_is_found_and_mended(tmp_path, capsys) -> None:
    """LevelDB's own files, sorted ones included, with one byte changed in the middle of a chunk."""
    data = tmp_path / "data"
    with open_store(data) as store:
        author = Author("alice")
        body = random.Random(5).randbytes(200_000)
        model = author.model()
        part = author.part(model.id, "embed", body)
        write(store, [model, part, author.release(model.id, [part])])
        store.pin(part.id, reason=Pin.PUBLISHED)
    with open_store(data):
        pass  # the log becomes a sorted file
    for file in (data / "chunks").iterdir():
        raw = bytearray(file.read_bytes())
        at = raw.find(body[90_000:90_016])
        if at > 0:
            raw[at] ^= 16
            file.write_bytes(raw)
            break
    else:
        raise AssertionError("the chunk is in no file")
    code, found = run(capsys, tmp_path)
    assert code == 1 and cid_text(part.id) in {bad["block"] for bad in found["bad"]}
    assert run(capsys, tmp_path, repair=True)[0] == 0


def test_a_home_without_a_store(tmp_path) -> None:
    with pytest.raises(Refused, match="has no store"):
        fsck(tmp_path / "nowhere", repair=False, as_json=False)


@pytest.mark.parametrize("seed", range(8))
def test_a_damaged_index_file_is_found_and_mended(tmp_path, capsys, seed) -> None:
    """A byte of LevelDB's sorted index file: whatever it hits, a repair leads to a clean store."""
    with open_store(tmp_path / "data") as store:
        made, update, _ = life(store)
    with open_store(tmp_path / "data"):
        pass  # the log becomes a sorted file
    file = max((tmp_path / "data" / "index").glob("*.ldb"), key=lambda f: f.stat().st_size)
    raw = bytearray(file.read_bytes())
    rng = random.Random(seed)
    at = rng.randrange(len(raw) * 3 // 4)  # the blocks of rows; behind them are LevelDB's own
    raw[at] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    print(f"seed {seed}: byte {at} of {len(raw)}")
    code, found = run(capsys, tmp_path)
    assert code == 1 and found["bad"]
    code, found = run(capsys, tmp_path, repair=True)
    assert code == 0 and found["repaired"], found
    with open_store(tmp_path / "data") as store:
        write(store, [*made, update])
        assert update.id in store.heads(made[0].id).values()
        assert check(store).bad == []


def test_another_schema_is_refused(tmp_path) -> None:
    with open_store(tmp_path) as store:
        store.index.engine.batch([(keys.SCHEMA_KEY, keys.SCHEMA_VALUE.pack(2, bytes(16)))])
    with pytest.raises(Refused, match="schema 2, this program reads schema 1"):
        open_store(tmp_path)
    engine = LevelDBEngine(tmp_path / "index", buffer_bytes=1 << 20, cache_bytes=1 << 20)
    engine.batch([(b"x", b"")], [keys.SCHEMA_KEY])
    engine.close()
    with pytest.raises(Refused, match="does not say of which version"):
        open_store(tmp_path)


def test_a_second_daemon_is_refused_in_one_line(tmp_path) -> None:
    with open_store(tmp_path / "data"):
        with pytest.raises(Refused, match=r"is in use by process \d+") as refused:
            open_store(tmp_path / "data")
        assert "\n" not in str(refused.value)
    with open_store(tmp_path / "data"):
        pass
