"""Nodes that plan for themselves reach the replica target together, slowly and within memory."""

from hypothesis import example, given
from hypothesis import strategies as st

from protocols import limits
from protocols.experts.placement import Member, Part, Plan, Steady, View, plan
from protocols.ids import BlockId, PeerId, cid


def block(n: int) -> BlockId:
    return BlockId(cid(b"expert %d" % n))


def simulate(sizes: list[int], memory: dict[str, int], replicas: int) -> dict[str, set[BlockId]]:
    """Every node carries out one round of its own plan after the other until nothing changes."""
    held: dict[str, set[BlockId]] = {name: set() for name in memory}
    parts = tuple(Part(block(n), size) for n, size in enumerate(sizes))
    by_block = {part.block: part.size for part in parts}

    def view(me: str) -> View:
        return View(
            PeerId(me),
            parts,
            tuple(
                Member(
                    PeerId(name),
                    memory[name] - sum(by_block[b] for b in held[name]),
                    True,
                    frozenset(held[name]),
                )
                for name in memory
            ),
            replicas,
        )

    for _ in range(200):
        plans = {name: plan(view(name)) for name in memory}
        if not any(each.hold or each.drop for each in plans.values()):
            return held
        for name, each in plans.items():
            held[name] |= set(each.hold)
            held[name] -= set(each.drop)
            assert sum(by_block[b] for b in held[name]) <= memory[name]
    raise AssertionError("the plans never come to rest")


def test_three_nodes_hold_each_expert_twice_and_share_evenly() -> None:
    held = simulate([10] * 12, {"bob": 1000, "carol": 1000, "dave": 1000}, 2)
    counts = [sum(block(n) in each for each in held.values()) for n in range(12)]
    assert counts == [2] * 12
    assert all(5 <= len(each) <= 11 for each in held.values())


def test_a_larger_node_takes_a_larger_share() -> None:
    held = simulate([10] * 60, {"bob": 1000, "carol": 4000}, 1)
    assert len(held["carol"]) > 2 * len(held["bob"]) > 0


def test_what_is_planned_does_not_change_while_it_is_carried_out() -> None:
    names = ("bob", "carol", "dave")
    empty = {name: plan(wide_view(name, {other: frozenset() for other in names})) for name in names}
    for done in range(1, len(empty["bob"].hold)):
        half = {name: frozenset[BlockId]() for name in names}
        half["bob"] = frozenset(empty["bob"].hold[:done])
        for name in ("carol", "dave"):
            assert set(plan(wide_view(name, half)).hold) == set(empty[name].hold)


def wide_view(me: str, held: dict[str, frozenset[BlockId]]) -> View:
    parts = tuple(Part(block(n), 10) for n in range(20))
    members = tuple(
        Member(PeerId(name), 1000 - 10 * len(blocks), True, blocks) for name, blocks in held.items()
    )
    return View(PeerId(me), parts, members, 2)


def test_every_expert_gets_a_first_holder_before_any_gets_a_second() -> None:
    held = simulate([10] * 12, {"bob": 50, "carol": 50, "dave": 50}, 2)
    counts = [sum(block(n) in each for each in held.values()) for n in range(12)]
    assert min(counts) == 1
    assert sum(counts) == 15


@example([13, 6, 7, 6, 7], [6, 6, 7, 12], 2)  # room made for one was taken by another
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=16),
    st.lists(st.integers(0, 120), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_plans_come_to_rest_within_memory(
    sizes: list[int], memories: list[int], replicas: int
) -> None:
    memory = {f"node{n}": size for n, size in enumerate(memories)}
    held = simulate(sizes, memory, replicas)
    for n, size in enumerate(sizes):
        holders = [name for name in held if block(n) in held[name]]
        assert len(holders) <= replicas
        if len(holders) < min(replicas, len(memory)):
            free = {
                name: memory[name] - sum(sizes[m] for m in range(len(sizes)) if block(m) in blocks)
                for name, blocks in held.items()
            }
            assert all(free[name] < size for name in held if name not in holders)


def view(me: str, held: dict[str, list[int]], free: int = 100, *, auto: bool = True) -> View:
    return View(
        PeerId(me),
        tuple(Part(block(n), 10) for n in range(4)),
        tuple(
            Member(PeerId(name), free, auto, frozenset(map(block, experts)))
            for name, experts in held.items()
        ),
        2,
    )


def test_of_too_many_holders_exactly_one_lets_go() -> None:
    held = {"bob": [0, 1, 2, 3], "carol": [0, 1, 2, 3], "dave": [0]}
    drops = {name: plan(view(name, held)).drop for name in held}
    assert sorted(len(drop) for drop in drops.values()) == [0, 0, 1]
    assert {b for drop in drops.values() for b in drop} == {block(0)}


def test_what_is_held_by_order_is_not_dropped() -> None:
    held = {"bob": [0], "carol": [0], "dave": [0]}
    for name in held:
        v = view(name, held, free=0)
        fixed = View(v.me, v.parts, v.members, v.replicas, fixed=frozenset({block(0)}))
        assert plan(fixed).drop == ()


def test_room_is_made_for_an_expert_that_nobody_holds() -> None:
    held = {"bob": [0, 1], "carol": [0, 2]}
    drops = [plan(view(name, held, free=0)).drop for name in held]
    assert sorted(drops) == [(), (block(0),)]


def test_a_node_that_takes_nothing_by_itself_is_given_nothing() -> None:
    assert plan(view("bob", {"bob": []}, auto=False)) == Plan()


def test_changes_wait_until_they_have_been_wanted_for_a_while() -> None:
    steady = Steady()
    wanted = Plan((block(0), block(1)), (block(2),), frozenset({block(0)}))
    assert steady.step(wanted, 0).hold == (block(0),)
    assert steady.step(wanted, limits.placement_deficit_s).hold == (block(0), block(1))
    assert steady.step(wanted, limits.placement_surplus_s - 1).drop == ()
    assert steady.step(wanted, limits.placement_surplus_s).drop == (block(2),)
    steady.step(Plan(), 40)
    assert steady.step(wanted, 41).hold == (block(0),)
    assert steady.step(wanted, 41).drop == ()
