"""Chunks, tensors and packs: shared, verified, bounded, and given back."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.testing.blocks import Author
from blyan_node.testing.writing import write
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.ids import chunk_hash
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry
from storage import keys
from storage.engine import Row
from storage.errors import BlockMissing, Corrupt, DiskFull
from storage.fsck import check
from storage.gc import collect, drop_body, make_room, pack
from storage.mapped import let_pages_go
from storage.memory import MemoryEngine
from storage.packs import ALIGNMENT
from storage.pins import Pin
from storage.store import Store, open_store
from storage.tensors import cut

CHUNK = limits.chunk_bytes


class CountingEngine(MemoryEngine):
    """Counts the rows that come, and how often the disk would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.syncs = 0

    def batch(
        self, puts: Sequence[Row], deletes: Sequence[bytes] = (), *, sync: bool = False
    ) -> None:
        super().batch(puts, deletes, sync=sync)
        self.rows += len(puts)
        self.syncs += sync


@given(st.lists(st.binary(max_size=30), max_size=12), st.integers(1, 16))
def test_cutting_keeps_the_bytes(pieces, size) -> None:
    found = list(cut(pieces, size))
    assert b"".join(found) == b"".join(pieces)
    assert all(len(piece) == size for piece in found[:-1])
    assert all(0 < len(piece) <= size for piece in found)


def test_tensors_are_stored_once_per_content(make_store) -> None:
    store = make_store()
    data = random.Random(1).randbytes(3 * CHUNK + 77)
    with store.ingest() as ingest:
        first = ingest.write_tensor("a", Dtype.U8, (len(data),), [data[:5], data[5:]])
        again = ingest.write_tensor("b", Dtype.U8, (len(data),), [memoryview(data)])
    assert first.chunks == again.chunks and first.size == len(data)
    assert (ingest.new_bytes, ingest.reused_bytes) == (len(data), len(data))
    assert store.stats().chunks == 4 and store.stats().chunk_bytes == len(data)
    assert b"".join(store.get_chunk(name) for name in first.chunks) == data
    with store.ingest() as later:
        later.write_tensor("c", Dtype.U8, (len(data),), [data])
    assert later.new_bytes == 0
    assert Manifest.decode(Manifest((first,)).encode()[1]).tensors == (first,)


def test_each_chunk_is_written_once_and_the_disk_is_waited_for_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ingest_unsynced_bytes_max", 4 * limits.ingest_batch_bytes)
    count = 10 * limits.ingest_batch_bytes // CHUNK
    chunks, index = CountingEngine(), CountingEngine()
    store = Store(index, chunks, tmp_path, free_bytes=lambda: 1 << 40)
    before = index.syncs
    with store.ingest() as ingest:
        ingest.write_tensor(
            "x", Dtype.U8, (count * CHUNK,), (os.urandom(CHUNK) for _ in range(count))
        )
    assert ingest.new_bytes == count * CHUNK
    assert chunks.rows == count
    assert chunks.syncs == 3  # at 4, 8 and 10 batches
    assert index.syncs - before == 3  # behind each of these


def test_a_chunk_that_is_not_its_hash_is_refused(make_store) -> None:
    store = make_store()
    with pytest.raises(RemoteProtocolError, match="hash"):
        store.put_chunks([(chunk_hash(b"a"), b"b")])
    assert store.get_chunk(chunk_hash(b"a")) is None


def test_a_chunk_of_another_size_than_its_manifest_says_is_not_read(make_store) -> None:
    store = make_store()
    store.put_chunks([(chunk_hash(b"long bytes"), b"long bytes")])
    block = Author("alice").model().block
    lied = TensorEntry("a", Dtype.U8, (3,), 3, (chunk_hash(b"long bytes"),))
    with pytest.raises(Corrupt, match="chunk 0 has 10 bytes"):
        list(store.read_tensor(block, lied))


def test_every_flipped_byte_of_a_chunk_is_noticed(make_store) -> None:
    store = make_store()
    data = random.Random(2).randbytes(300)
    name = chunk_hash(data)
    store.put_chunks([(name, data)])
    place = keys.DATA.key(store.chunks.find(name)[0], name)
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        store.chunks.data.batch([(place, bytes(bad))])
        with pytest.raises(Corrupt, match="damaged"):
            store.get_chunk(name)
        report = check(store)
        assert report.bad_chunks == {name}


def test_a_quota_and_a_full_disk_refuse_before_anything_is_lost(make_store) -> None:
    free = [10**12]
    store = make_store(quota_bytes=1_000, free_bytes=lambda: free[0])
    store.put_chunks([(chunk_hash(b"a" * 600), b"a" * 600)])
    with pytest.raises(DiskFull, match="--disk allows 1000"):
        store.put_chunks([(chunk_hash(b"b" * 600), b"b" * 600)])
    with pytest.raises(DiskFull), store.ingest() as ingest:
        ingest.write_tensor("x", Dtype.U8, (600,), [b"c" * 600])
    free[0] = limits.disk_reserve_bytes
    with pytest.raises(DiskFull, match="in reserve"):
        store.put_chunks([(chunk_hash(b"d"), b"d")])
    free[0] += 1_000
    store.put_chunks([(chunk_hash(b"d"), b"d")])
    assert store.get_chunk(chunk_hash(b"a" * 600)) == b"a" * 600
    assert check(store).ok


def test_gc_sweeps_what_no_block_names_and_nothing_else(make_store) -> None:
    store = make_store()
    author = Author("alice")
    model = author.model()
    part = author.part(model.id, "embed", b"kept" * 100)
    store.put_chunks([*model.chunks, *part.chunks])
    rows = [(m.manifest_id, m.manifest_bytes) for m in (model, part)]
    store.stage([model.block, part.block], rows)
    loose = os.urandom(1_000)
    store.put_chunks([(chunk_hash(loose), loose)])
    with store.ingest() as ingest:
        ingest.write_tensor("x", Dtype.U8, (9,), [b"unwritten"])
        ingest.flush()
        assert collect(store) == 0  # somebody is writing
    assert collect(store) == len(loose) + 9
    assert store.is_stored(model.id) and store.is_stored(part.id)
    assert store.get_chunk(chunk_hash(loose)) is None
    assert collect(store) == 0 and check(store).ok
    store.put_chunks([(chunk_hash(loose), loose)])
    assert store.get_chunk(chunk_hash(loose)) == loose


def test_dropping_a_body_leaves_header_pin_and_shared_chunks(make_store) -> None:
    store = make_store()
    author = Author("alice")
    model = author.model()
    shared = bytes(CHUNK)
    parts = [author.part(model.id, f"layer0.expert{n}", shared + b"%d" % n) for n in (0, 1)]
    for made in (model, *parts):
        store.put_chunks(made.chunks)
        store.stage([made.block], [(made.manifest_id, made.manifest_bytes)])
    store.pin(parts[0].id, reason=Pin.HELD)
    store.pack(parts[0].id)
    assert drop_body(store, parts[0].id) == 1
    assert store.block(parts[0].id) is not None
    assert store.missing_chunks(parts[0].id) == [(chunk_hash(b"0"), 1)]
    assert store.is_stored(parts[1].id)
    assert store.packs.bytes == 0
    report = check(store)
    assert report.incomplete == {parts[0].id} and len(report.bad) == 1
    store.put_chunks(parts[0].chunks)
    assert check(store).ok


def test_a_pack_is_aligned_made_once_and_made_anew_if_it_does_not_fit(make_store, tmp_path) -> None:
    store = make_store()
    bodies = {"a": b"x" * 70, "b": os.urandom(CHUNK + 3), "empty": b"", "c": b"z"}
    author = Author("alice")
    model = author.model()
    made = author.make("expert", bodies, model=model.id, subject="layer0.expert0")
    store.put_chunks(made.chunks)
    store.stage([made.block], [(made.manifest_id, made.manifest_bytes)])
    pack = store.pack(made.id)
    assert {n: bytes(view) for n, (_, _, view) in pack.tensors.items()} == bodies
    (file,) = (tmp_path / "data" / "packs").iterdir()
    assert file.stat().st_size == pack.bytes and pack.bytes % ALIGNMENT == 0
    with pytest.raises(TypeError, match="read-only"):
        pack.tensors["a"][2][0] = 0
    assert check(store).ok

    whole = bytearray(file.read_bytes())
    whole[130] ^= 4
    file.write_bytes(whole)
    again = make_store()
    assert [bad.what for bad in check(again).bad] == ["pack"]
    assert bytes(again.pack(made.id).tensors["b"][2]) == bodies["b"]
    assert check(again).ok
    again.packs.drop(made.id)
    assert bytes(again.pack(made.id).tensors["c"][2]) == b"z"


def test_a_pack_of_a_block_with_a_missing_chunk_names_it(make_store) -> None:
    store = make_store()
    author = Author("alice")
    model = author.model()
    made = author.part(model.id, "layer0.expert3", os.urandom(2 * CHUNK))
    store.put_chunks(made.chunks[:1])
    store.stage([made.block], [(made.manifest_id, made.manifest_bytes)])
    with pytest.raises(BlockMissing, match=r"layer0\.expert3"):
        store.pack(made.id)
    assert store.packs.bytes == 0
    store.put_chunks(made.chunks)
    assert store.pack(made.id).bytes == 2 * CHUNK


def expert(store, name: str, size: int):
    """A stored expert of `size` bytes."""
    author = Author(name)
    model = author.model()
    made = author.part(model.id, "layer0.expert0", random.Random(name).randbytes(size))
    store.put_chunks(made.chunks)
    store.stage([made.block], [(made.manifest_id, made.manifest_bytes)])
    return made


def test_packs_count_as_stored_and_go_when_they_are_dropped(make_store) -> None:
    store = make_store(quota_bytes=5 * CHUNK)
    alice, bob = expert(store, "alice", CHUNK), expert(store, "bob", CHUNK)
    mapped = store.pack(alice.id)
    assert store.stats().pack_bytes == mapped.bytes == CHUNK
    loose = [os.urandom(CHUNK) for _ in range(3)]
    with pytest.raises(DiskFull, match="--disk"):
        store.put_chunks([(chunk_hash(data), data) for data in loose])
    store.put_chunks([(chunk_hash(data), data) for data in loose[:2]])
    with pytest.raises(DiskFull, match="--disk"):
        store.pack(bob.id)
    assert store.packs.drop(alice.id) == CHUNK
    assert store.packs.drop(alice.id) == 0
    assert chunk_hash(bytes(next(iter(mapped.tensors.values()))[2])) == alice.chunks[0][0]
    store.pack(bob.id)
    assert store.stats().pack_bytes == CHUNK


def test_room_for_a_pack_is_made_of_what_nobody_needs(make_store) -> None:
    store = make_store(quota_bytes=4 * CHUNK)
    alice, bob = expert(store, "alice", CHUNK), expert(store, "bob", CHUNK)
    store.pack(alice.id)
    again = make_store(quota_bytes=4 * CHUNK)  # the next run: it does not open alice's pack
    loose = os.urandom(CHUNK)
    again.put_chunks([(chunk_hash(loose), loose)])
    assert again.stats().pack_bytes == CHUNK
    assert pack(again, bob.id).bytes == CHUNK  # instead of what the run before has left
    assert again.stats().pack_bytes == CHUNK and again.has_chunk(chunk_hash(loose))
    assert pack(again, alice.id).bytes == CHUNK  # instead of what no block names
    assert again.stats().pack_bytes == 2 * CHUNK and not again.has_chunk(chunk_hash(loose))


def test_packs_are_made_and_dropped_by_many_at_once(make_store) -> None:
    store = make_store()
    made = [expert(store, name, 3 * CHUNK + n) for n, name in enumerate(("alice", "bob", "carol"))]
    wrong: list[str] = []

    def work(seed: int) -> None:
        pick = random.Random(seed)
        for _ in range(60):
            one = pick.choice(made)
            if pick.random() < 0.4:
                store.packs.drop(one.id)
                continue
            ((_, _, data),) = store.pack(one.id).tensors.values()
            if bytes(data[:CHUNK]) != one.chunks[0][1]:
                wrong.append(str(one.id))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert not wrong
    for one in made:
        store.packs.drop(one.id)
    assert store.packs.bytes == 0


def test_the_memory_of_a_pack_is_the_files(tmp_path) -> None:
    with open_store(tmp_path / "store") as store:
        size = 64 * CHUNK
        made = expert(store, "alice", size)
        views = store.pack(made.id).tensors
        before = memory()
        total = sum(sum(view[:: 1 << 10]) for _, _, view in views.values())
        after = memory()
        assert total > 0
        assert after["RssFile"] - before["RssFile"] > 0.9 * size
        assert after["RssAnon"] - before["RssAnon"] < size / 8
        views.clear()
        assert memory()["RssFile"] < before["RssFile"] + size / 8


def test_reading_bodies_does_not_fill_the_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(limits, "read_bytes_resident_max", 4 * limits.MIB)
    with open_store(tmp_path / "store") as store:
        made = expert(store, "alice", 48 * limits.MIB)
    with open_store(tmp_path / "store") as store:
        if not let_pages_go(tmp_path):
            pytest.skip("this system cannot take pages back on request")
        before = memory()["RssFile"]
        grown = []
        for _, pieces in store.read_body(made.id):
            for _ in pieces:
                grown.append(memory()["RssFile"] - before)
        assert len(grown) == 192 and max(grown) < 16 * limits.MIB


def memory() -> dict[str, int]:
    """What the system says that this process has in memory, in bytes, by where it is from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    rows = (line.split() for line in lines if line.startswith("Rss"))
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def test_space_comes_back_to_the_disk(tmp_path) -> None:
    with open_store(tmp_path) as store:
        rng = random.Random(9)
        rows = [(chunk_hash(d), d) for d in (rng.randbytes(CHUNK) for _ in range(24))]
        store.put_chunks(rows)
    with open_store(tmp_path) as store:
        used = sum(f.stat().st_size for f in (tmp_path / "chunks").iterdir())
        assert used > 24 * CHUNK
        assert collect(store) == 24 * CHUNK
        used = sum(f.stat().st_size for f in (tmp_path / "chunks").iterdir())
        assert used < CHUNK
        assert check(store).ok


def test_room_is_made_of_what_nobody_keeps_old_versions_first(make_store) -> None:
    store = make_store(free_bytes=lambda: 1 << 40)
    author = Author("alice")
    subjects = ("embed", "layer0.expert0", "layer0.expert1", "layer0.expert2")
    made = author.publish("tiny", subjects)
    update = author.update(made[2], b"u" * 1_000)
    write(store, [*made, update])
    store.pin(made[1].id, reason=Pin.PUBLISHED)
    loose = b"l" * 500
    store.put_chunks([(chunk_hash(loose), loose)])
    assert make_room(store, 400) == 500  # what no block names goes first
    assert all(store.is_stored(one.id) for one in (*made, update))
    old, *_ = made[2].chunks
    assert make_room(store, 1) == len(old[1])  # then a version that is no head any more
    assert store.missing_chunks(made[2].id) == [(old[0], len(old[1]))]
    make_room(store, 1 << 40, {made[3].id})
    assert not store.is_stored(update.id) and not store.is_stored(made[4].id)
    assert all(store.is_stored(one.id) for one in (made[0], made[1], made[3], made[-1]))
    assert check(store).ok
