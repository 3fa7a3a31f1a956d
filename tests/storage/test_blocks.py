"""The chain as it is kept: staged, accepted, logged, with heads and their past."""

import pytest

from blyan_node.testing.blocks import Author
from blyan_node.testing.writing import write
from protocols.dag.heads import heads_of
from protocols.ids import Subject, model_root
from storage.errors import BlockMissing, Corrupt
from storage.memory import MemoryEngine
from storage.pins import Pin
from storage.store import Store


def test_a_publish_is_staged_and_enters_the_log_with_its_release(make_store) -> None:
    store = make_store()
    model, *parts, release = Author("alice").publish()
    write(store, [model, *parts])
    assert store.stats().staged == 3
    assert store.log(0, 10) == [] and store.models() == []
    assert set(store.staged(model.id)) == {model.id, *(p.id for p in parts)}
    write(store, [release])
    assert store.stats().staged == 0 and store.staged(model.id) == []
    ids = [id for _, id in store.log(0, 10)]
    assert ids[0] == model.id and ids[-1] == release.id and len(ids) == 4
    assert [seq for seq, _ in store.log(0, 10)] == [1, 2, 3, 4]
    assert store.log(2, 1) == [(3, ids[2])]
    assert store.models() == [model.id] and store.releases(model.id) == [release.id]
    assert store.release_subjects(release.id) == release.subjects
    assert store.heads(model.id) == release.subjects


def test_updates_move_heads_and_old_roots_still_resolve(make_store) -> None:
    store = make_store()
    author = Author("alice")
    made = author.publish()
    write(store, made)
    model, expert = made[0].id, made[2]
    roots = [(model_root(model, store.heads(model)), dict(store.heads(model)))]
    for n in range(4):
        expert = author.update(expert, b"new %d" % n)
        write(store, [expert])
        assert store.heads(model)[Subject("layer0.expert0")] == expert.id
        roots.append((model_root(model, store.heads(model)), dict(store.heads(model))))
    again = make_store()
    assert again.heads(model) == heads_of(model, again).heads == roots[-1][1]
    for root, heads in roots:
        assert again.heads_at(root) == (model, heads)
    assert again.heads_at(bytes(32)) is None


def test_a_competing_first_release_replaces_heads_and_keeps_the_past(make_store) -> None:
    store = make_store()
    author = Author("alice")
    model = author.model()
    parts = [author.part(model.id, s, s.encode()) for s in ("embed", "layer0.expert0")]
    releases = [author.release(model.id, parts), author.release(model.id, parts[:1])]
    releases.sort(key=lambda made: made.id, reverse=True)
    write(store, [model, *parts, *releases])
    assert store.heads(model.id) == releases[1].subjects == heads_of(model.id, store).heads
    for release in releases:
        found = store.heads_at(model_root(model.id, release.subjects))
        assert found == (model.id, release.subjects)


def test_accepting_twice_changes_nothing(make_store) -> None:
    store = make_store()
    made = Author("alice").publish()
    write(store, made)
    before = store.stats(), store.log(0, 99)
    store.accept([one.block for one in made])
    store.stage([one.block for one in made])
    assert (store.stats(), store.log(0, 99)) == before


def test_unstaged_blocks_are_forgotten(make_store) -> None:
    store = make_store()
    model, part, *_ = Author("alice").publish()
    write(store, [model, part])
    store.unstage([part.id])
    assert store.block(part.id) is None and store.staged(model.id) == [model.id]
    assert store.stats().staged == 1


def test_what_was_unstaged_leaves_no_manifest_and_no_pin(make_store) -> None:
    """Else a peer could fill the index with manifests of publishes that never end."""
    store = make_store()
    alice = Author("alice")
    model, part, *_ = alice.publish()
    data = b"".join(data for _, data in part.chunks)
    twin = alice.part(model.id, str(part.block.header.subject), data)
    assert twin.manifest_id == part.manifest_id and twin.id != part.id
    write(store, [model, part, twin])
    store.pin(part.id, reason=Pin.PUBLISHED)
    store.unstage([part.id])
    assert store.pins.of(part.id) == set()
    assert store.manifest(twin.manifest_id) == twin.manifest  # another block needs it
    store.unstage([twin.id])
    assert store.manifest(twin.manifest_id) is None
    assert store.manifest(model.manifest_id) is not None


def test_the_largest_seq_of_an_author(make_store) -> None:
    store = make_store()
    alice = Author("alice")
    assert store.author_seq(alice.identity.public) == 0
    write(store, alice.publish())
    assert store.author_seq(alice.identity.public) == alice.seq


def test_cursors_pins_and_log_id_survive(make_store) -> None:
    store = make_store()
    peer, made = Author("bob").identity.peer_id, Author("alice").publish()
    store.set_cursor(peer, b"l" * 16, 7)
    store.pin(made[0].id, made[1].id, reason=Pin.PUBLISHED)
    store.pin(made[1].id, reason=Pin.HELD)
    again = make_store()
    assert again.log_id == store.log_id
    assert again.cursor(peer, b"l" * 16) == 7 and again.cursor(peer, b"m" * 16) == 0
    assert again.pins.of(made[1].id) == {Pin.PUBLISHED, Pin.HELD}
    again.unpin(made[1].id, reason=Pin.HELD)
    assert again.pins.of(made[1].id) == {Pin.PUBLISHED}


def test_reading_counts_by_block_and_names_what_is_missing(make_store) -> None:
    store = make_store()
    made = Author("alice").publish()
    write(store, made)
    expert, embed = made[2], made[1]
    ((_, pieces),) = store.read_body(expert.id)
    assert b"".join(pieces) == b"tiny layer0.expert0"
    assert store.reads[expert.id] == 1 and store.reads[embed.id] == 0
    store.chunks.remove([expert.chunks[0][0]])
    assert not store.is_stored(expert.id) and store.is_stored(embed.id)
    assert store.missing_chunks(expert.id) == [(expert.chunks[0][0], 19)]
    with pytest.raises(BlockMissing, match=r"layer0\.expert0") as missing:
        store.pack(expert.id)
    assert missing.value.data["subject"] == "layer0.expert0"


@pytest.mark.parametrize("family", ["BLOCK", "MANIFEST"])
def test_every_flipped_byte_of_a_block_is_noticed_by_its_reader(make_store, family) -> None:
    from storage import keys

    store = make_store()
    made = Author("alice").publish()
    write(store, made)
    one = made[1]
    key = keys.BLOCK.key(one.id) if family == "BLOCK" else keys.MANIFEST.key(one.manifest_id)
    good = store.index.engine.get(key)
    for at in range(len(good)):
        bad = bytearray(good)
        bad[at] ^= 1 << at % 8
        store.index.engine.batch([(key, bytes(bad))])
        with pytest.raises(Corrupt, match="is damaged"):
            store.body(one.id)


def test_appending_costs_the_same_in_a_short_chain_and_in_a_long_one(tmp_path) -> None:
    """Counted in engine calls and rows, not in seconds."""
    calls: list[int] = []

    class Counting(MemoryEngine):
        def get(self, key: bytes) -> bytes | None:
            calls.append(1)
            return super().get(key)

        def batch(self, puts, deletes=(), *, sync=False) -> None:
            calls.append(len(puts) + len(deletes))
            super().batch(puts, deletes, sync=sync)

        def iterate(self, prefix, *, start=None, reverse=False):
            for row in super().iterate(prefix, start=start, reverse=reverse):
                calls.append(1)
                yield row

    store = Store(Counting(), Counting(), tmp_path, free_bytes=lambda: 1 << 40)
    author = Author("alice")
    made = author.publish()
    write(store, made)
    head, costs = made[2], {}
    for number in range(1, 1_001):
        head = author.update(head, b"%d" % number)
        calls.clear()
        write(store, [head])
        costs[number] = sum(calls)
    assert costs[10] == costs[100] == costs[1_000]
    assert store.log(1_000, 1)[0][0] == 1_001
