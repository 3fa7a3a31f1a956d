"""The pool of parked blocks: woken by what they wait for, bounded for each source and for all."""

from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.testing.blocks import Author, Made
from protocols.dag.admission import Parked
from protocols.dag.orphans import ENTRY_BYTES, Orphan, OrphanPool, PoolLimits
from protocols.ids import BlockId

ALICE = Author("alice")
MODEL = ALICE.model()
PARTS = [ALICE.part(MODEL.id, f"layer0.expert{i}") for i in range(40)]


def parked(made: Made, *waits: BlockId) -> Parked:
    return Parked(made.block, blocks=frozenset(waits or (MODEL.id,)))


def cost(made: Made) -> int:
    return len(made.block.raw) + ENTRY_BYTES


def test_what_waited_is_taken_out_by_the_last_of_its_reasons() -> None:
    pool = OrphanPool()
    first, last = sorted((MODEL.id, PARTS[9].id))
    pool.add(parked(PARTS[0], first, last), "bob")
    pool.add(parked(PARTS[1], first), "carol")
    assert pool.missing() == {first, last}
    assert pool.arrived([first]) == [Orphan(PARTS[1].block, "carol")]
    assert pool.arrived([last]) == [Orphan(PARTS[0].block, "bob")]
    assert (len(pool), pool.bytes, pool.missing()) == (0, 0, frozenset())


def test_a_source_over_its_share_loses_its_own_oldest() -> None:
    pool = OrphanPool(PoolLimits(10, 10**6, 3, 10**6))
    pool.add(parked(PARTS[0]), "bob")
    for made in PARTS[1:4]:
        assert pool.add(parked(made), "mallory") == []
    assert pool.add(parked(PARTS[4]), "mallory") == [PARTS[1].id]
    assert PARTS[0].id in pool and PARTS[4].id in pool


def test_one_source_cannot_evict_another_below_what_it_uses() -> None:
    pool = OrphanPool(PoolLimits(8, 10**6, 6, 10**6))
    pool.add(parked(PARTS[0]), "bob")
    pool.add(parked(PARTS[1]), "carol")
    for made in PARTS[2:]:
        pool.add(parked(made), "mallory")
    assert PARTS[0].id in pool and PARTS[1].id in pool
    assert len(pool) == 8


def test_the_share_in_bytes_holds_too() -> None:
    room = 3 * cost(PARTS[1]) + 20
    pool = OrphanPool(PoolLimits(100, 10**6, 100, room))
    for made in PARTS[1:20]:
        pool.add(parked(made), "mallory")
        assert pool.bytes <= room
    assert len(pool) == 3


def test_what_is_too_large_for_any_share_is_not_kept() -> None:
    pool = OrphanPool(PoolLimits(100, 10**6, 100, cost(PARTS[0]) - 1))
    assert pool.add(parked(PARTS[0]), "mallory") == [PARTS[0].id]
    assert len(pool) == 0 and pool.bytes == 0


def test_parking_again_replaces_the_reasons_and_keeps_the_source() -> None:
    pool = OrphanPool()
    pool.add(parked(PARTS[0], MODEL.id), "bob")
    pool.add(parked(PARTS[0], PARTS[1].id), "mallory")
    assert pool.missing() == {PARTS[1].id}
    assert pool.arrived([PARTS[1].id]) == [Orphan(PARTS[0].block, "bob")]


def test_a_manifest_waits_with_its_block_and_counts() -> None:
    pool = OrphanPool()
    pool.add(parked(PARTS[0]), "bob", b"m" * 1000)
    assert pool.bytes == cost(PARTS[0]) + 1000
    pool.add(parked(PARTS[0]), "carol")
    assert pool.arrived([MODEL.id]) == [Orphan(PARTS[0].block, "bob", b"m" * 1000)]
    assert pool.bytes == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 4), st.sampled_from("abc"))))
def test_the_bounds_hold_and_the_books_balance(steps: list[tuple[int, int, str]]) -> None:
    bounds = PoolLimits(9, 9_000, 5, 5_000)
    pool = OrphanPool(bounds)
    for at, wait, source in steps:
        if source == "c" and wait == 0:
            pool.arrived([PARTS[at].id])
        else:
            pool.add(parked(PARTS[at], PARTS[wait].id, PARTS[wait + 1].id), source)
        assert len(pool) <= bounds.blocks and pool.bytes <= bounds.bytes
    assert pool.bytes == sum(cost(m) for m in PARTS if m.id in pool)
    pool.arrived(pool.missing())
    assert (len(pool), pool.bytes, pool.missing()) == (0, 0, frozenset())
