"""What a peer can make a node keep, and for how long."""

import random
from collections import Counter
from pathlib import Path

import pytest

from blyan_node.services.intake import LEFT_OVER, OURSELVES, Intake, Outcome
from blyan_node.testing.blocks import Author, Made
from protocols import limits
from protocols.dag import admission
from protocols.dag.admission import Accepted, Duplicate, Parked, Staged
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId
from storage import keys
from storage.memory import MemoryEngine
from storage.store import Store

ALICE = Author("alice")
PUBLISHED = ALICE.publish(subjects=[f"layer0.expert{i}" for i in range(5)])


class CountingEngine(MemoryEngine):
    """Notes the keys that are looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.gets: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        self.gets.append(key)
        return super().get(key)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(MemoryEngine(), MemoryEngine(), tmp_path, free_bytes=lambda: 1 << 40)


def give(store: Store, intake: Intake, made: Made, source: str) -> list[Outcome]:
    if made.subjects is not None:
        store.stage([], release_subjects={made.id: made.subjects})
    rows = {made.manifest_id: (made.manifest, made.manifest_bytes)}
    return intake.take([made.block], rows, source)


def test_every_order_of_arrival_ends_the_same(tmp_path: Path) -> None:
    rng = random.Random(4)
    update = ALICE.update(PUBLISHED[2], b"new")
    after = ALICE.update(update, b"newer")
    everything = [*PUBLISHED, update, after]
    for _ in range(30):
        store = Store(MemoryEngine(), MemoryEngine(), tmp_path, free_bytes=lambda: 1 << 40)
        intake = Intake(store)
        for made in rng.sample(everything, len(everything)):
            give(store, intake, made, "bob")
        assert store.stats().accepted == len(everything) and store.stats().staged == 0
        assert store.heads(PUBLISHED[0].id)["layer0.expert1"] == after.id
        assert len(intake.pool) == 0


def test_a_batch_is_decided_in_its_order_and_its_outcomes_come_first(store: Store) -> None:
    intake = Intake(store)
    update = ALICE.update(PUBLISHED[1], b"new")
    parked = give(store, intake, update, "bob")
    assert isinstance(parked[0].verdict, Parked)
    rows = {m.manifest_id: (m.manifest, m.manifest_bytes) for m in PUBLISHED}
    assert PUBLISHED[-1].subjects is not None
    store.stage([], release_subjects={PUBLISHED[-1].id: PUBLISHED[-1].subjects})
    outcomes = intake.take([m.block for m in PUBLISHED], rows, "carol")
    kinds = [type(o.verdict) for o in outcomes]
    assert kinds == [Staged] * 6 + [Accepted, Accepted]
    assert (outcomes[-1].block.id, outcomes[-1].source) == (update.id, "bob")
    again = intake.take([PUBLISHED[-1].block], {}, "carol")
    assert isinstance(again[0].verdict, Duplicate)


def test_a_new_header_costs_two_lookups(tmp_path: Path) -> None:
    """One when it is decided about, one when it is written; its parent is looked up once a page."""
    index = CountingEngine()
    store = Store(index, MemoryEngine(), tmp_path, free_bytes=lambda: 1 << 40)
    intake = Intake(store)
    give(store, intake, PUBLISHED[0], "bob")
    parts = PUBLISHED[1:-1]
    rows = {made.manifest_id: (made.manifest, made.manifest_bytes) for made in parts}
    index.gets.clear()
    outcomes = intake.take([made.block for made in parts], rows, "bob")
    assert all(isinstance(outcome.verdict, Staged) for outcome in outcomes)
    asked = Counter(key for key in index.gets if key.startswith(keys.BLOCK.tag))
    new = {keys.BLOCK.key(made.id): 2 for made in parts}
    assert asked == new | {keys.BLOCK.key(PUBLISHED[0].id): 1}


def test_publishes_that_never_end_are_dropped_when_a_source_has_too_many(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "staged_blocks_per_peer_max", 4)
    intake = Intake(store)
    ours = Author("bob").publish()
    for made in ours[:-1]:
        give(store, intake, made, OURSELVES)
    outcomes = [give(store, intake, made, "mallory")[0] for made in PUBLISHED[:5]]
    assert isinstance(outcomes[-1].verdict, RemoteProtocolError)
    assert [store.block(m.id) for m in PUBLISHED[:5]] == [None] * 5
    assert all(store.block(m.id) for m in ours[:-1])
    assert store.stats().staged == len(ours) - 1


def test_bytes_count_as_well_as_blocks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "staged_bytes_per_peer_max", 900)
    intake = Intake(store)
    verdicts = [give(store, intake, made, "mallory")[0].verdict for made in PUBLISHED[:4]]
    assert any(isinstance(v, RemoteProtocolError) for v in verdicts)
    assert store.stats().staged < 4


def test_many_sources_together_are_bounded_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "staged_blocks_max", 8)
    intake = Intake(store)
    for name in ("mallory", "mike", "moe"):
        for made in Author(name).publish()[:-1]:
            give(store, intake, made, name)
            assert store.stats().staged <= 9
    for made in PUBLISHED:
        give(store, intake, made, "bob")
    assert store.is_accepted(PUBLISHED[-1].id)


def test_bytes_of_many_sources_together_are_bounded_too(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "staged_bytes_max", 3_000)
    intake = Intake(store)
    for name in ("mallory", "mike", "moe", "mo"):
        for made in Author(name).publish()[:-1]:
            give(store, intake, made, name)
            assert intake._staged.bytes <= 3_000
    assert intake._staged.bytes == Intake(store)._staged.bytes  # an earlier run's count as much


def test_a_release_is_not_looked_at_for_each_block_that_it_lists(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a model of n experts costs n² look-ups, which is many minutes for thousands."""
    many = ALICE.publish("many", subjects=[f"layer0.expert{i}" for i in range(200)])
    looked = []
    plain = admission.check_release
    monkeypatch.setattr(
        admission, "check_release", lambda *args, **kw: (looked.append(1), plain(*args, **kw))[1]
    )
    intake = Intake(store)
    give(store, intake, many[0], "bob")
    give(store, intake, many[-1], "bob")
    for made in sorted(many[1:-1], key=lambda m: m.id):
        give(store, intake, made, "bob")
    assert store.is_accepted(many[-1].id)
    assert len(looked) < 5


def test_what_an_earlier_run_staged_is_counted(store: Store) -> None:
    give(store, Intake(store), PUBLISHED[0], "bob")
    again = Intake(store)
    assert again._staged.stalest() == LEFT_OVER
    for made in PUBLISHED:
        give(store, again, made, "bob")
    assert again._staged.stalest() is None


def test_what_is_refused_leaves_nothing_behind(store: Store) -> None:
    intake = Intake(store)
    for made in PUBLISHED:
        give(store, intake, made, "bob")
    bad = Author("mallory").update(PUBLISHED[1], b"evil")
    (outcome,) = give(store, intake, bad, "mallory")
    assert isinstance(outcome.verdict, RemoteProtocolError)
    assert store.block(BlockId(bad.id)) is None and len(intake.pool) == 0
    assert store.manifest(bad.manifest_id) is None
