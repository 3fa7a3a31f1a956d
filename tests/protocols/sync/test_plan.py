"""The fetch plan: different items of every peer, nothing twice, nothing lost."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.ids import PeerId
from protocols.sync.plan import Assignment, FetchPlan, PlanLimits

ALICE, BOB, CAROL = PeerId("alice"), PeerId("bob"), PeerId("carol")
BOUNDS = PlanLimits(batch=2, in_flight=4, failures=3, backoff_s=1.0, slow_s=5.0)


def items(count: int) -> list[tuple[bytes, int]]:
    return [(b"%03d" % i, 10 + i) for i in range(count)]


def plan_for(count: int, *peers: PeerId) -> FetchPlan[bytes]:
    plan = FetchPlan(items(count), BOUNDS)
    for peer in peers:
        plan.add_peer(peer)
    return plan


def bring(plan: FetchPlan[bytes], assignment: Assignment[bytes]) -> None:
    plan.arrived(assignment, assignment.keys)
    plan.answered(assignment)


def test_peers_are_asked_for_different_items_up_to_their_limit() -> None:
    plan = plan_for(20, ALICE, BOB)
    asked = plan.next(0)
    keys = [k for a in asked for k in a.keys]
    assert len(keys) == len(set(keys)) == 8
    assert [a.peer for a in asked] == [ALICE, BOB, ALICE, BOB]
    assert sorted(keys) == [k for k, _ in items(8)]
    assert plan.next(0) == []
    bring(plan, asked[1])
    (more,) = plan.next(0)
    assert more.peer == BOB and plan.bytes_by_peer == {BOB: 12 + 13}


def test_what_a_peer_lacks_is_asked_of_another() -> None:
    plan = plan_for(2, ALICE)
    (asked,) = plan.next(0)
    plan.arrived(asked, asked.keys[:1])
    plan.answered(asked, absent=asked.keys[1:])
    assert plan.next(0) == []
    assert plan.stuck() == [b"001"]
    plan.add_peer(BOB)
    assert plan.stuck() == []
    (again,) = plan.next(0)
    assert (again.peer, again.keys) == (BOB, (b"001",))


def test_what_did_not_fit_is_asked_again() -> None:
    plan = plan_for(2, ALICE)
    (asked,) = plan.next(0)
    plan.arrived(asked, asked.keys[:1])
    plan.answered(asked)
    (again,) = plan.next(0)
    assert again.keys == (b"001",)


def test_a_failing_peer_rests_longer_each_time_and_then_goes() -> None:
    plan = plan_for(1, ALICE)
    now = 0.0
    for rest in (1.0, 2.0):
        (asked,) = plan.next(now)
        plan.failed(asked, now)
        assert plan.next(now) == [] and plan.stuck() == []
        assert plan.wake_at(now) == now + rest
        now += rest
    (asked,) = plan.next(now)
    plan.failed(asked, now)
    assert plan.peers == [] and plan.stuck() == [b"000"]


def test_a_good_answer_clears_the_failures() -> None:
    plan = plan_for(9, ALICE)
    for _ in range(4):
        one, *_ = plan.next(1000)
        plan.failed(one, 0)
        two, *_ = plan.next(1000)
        bring(plan, two)
    assert plan.peers == [ALICE]


def test_a_corrupt_peer_is_asked_no_more_and_its_work_goes_to_others() -> None:
    plan = plan_for(8, ALICE, BOB)
    asked = plan.next(0)
    bad = next(a for a in asked if a.peer == ALICE)
    plan.corrupt(bad)
    plan.add_peer(ALICE)
    assert plan.peers == [BOB]
    for a in asked:
        if a.peer == BOB:
            bring(plan, a)
    while asked := plan.next(0):
        assert {a.peer for a in asked} == {BOB}
        for a in asked:
            bring(plan, a)
    assert plan.done and plan.bytes_done == plan.bytes_total


def test_a_late_end_of_a_dropped_peers_request_is_harmless() -> None:
    plan = plan_for(2, ALICE, BOB)
    (asked,) = plan.next(0)
    plan.drop_peer(asked.peer)
    plan.failed(asked, 0)
    assert plan.arrived(asked, asked.keys[:1]) == [b"000"]
    plan.answered(asked)
    assert plan.bytes_by_peer == {asked.peer: 10}
    (again,) = plan.next(0)
    assert again.keys == (b"001",)


def test_slow_items_are_asked_once_more_of_an_idle_peer() -> None:
    plan = plan_for(2, ALICE)
    (slow,) = plan.next(0)
    plan.add_peer(BOB)
    assert plan.next(4.9) == [] and plan.wake_at(4.9) == 5.0
    (again,) = plan.next(5.0)
    assert (again.peer, again.keys) == (BOB, slow.keys)
    plan.add_peer(CAROL)
    assert plan.next(6.0) == []
    assert plan.wake_at(6.0) == 10.0  # not the moment that has passed: nobody waits in circles
    bring(plan, again)
    assert plan.done
    assert plan.arrived(slow, slow.keys) == []
    plan.answered(slow)
    assert plan.bytes_by_peer == {BOB: 21}


def test_a_group_that_a_peer_has_nothing_of_is_not_asked_further() -> None:
    plan = FetchPlan[bytes](bounds=BOUNDS)
    plan.want(items(50), group=b"block")
    plan.want([(b"other", 1)])
    plan.add_peer(ALICE)
    one, two = plan.next(0)
    plan.answered(one, absent=one.keys)
    (asked,) = plan.next(0)
    assert asked.keys == (b"other",)
    plan.answered(asked, absent=asked.keys)
    plan.failed(two, 0)
    assert len(plan.stuck()) == 51 and plan.next(100) == []


def test_a_group_that_a_peer_has_some_of_is_asked_on() -> None:
    plan = FetchPlan[bytes](bounds=BOUNDS)
    plan.want(items(4), group=b"block")
    plan.add_peer(ALICE)
    one, two = plan.next(0)
    plan.arrived(one, one.keys[:1])
    plan.answered(one, absent=one.keys[1:])
    plan.failed(two, 0)
    (asked,) = plan.next(1)
    assert asked.keys == two.keys


def test_preferred_peers_are_asked_first() -> None:
    plan = plan_for(2, ALICE)
    plan.add_peer(BOB, preferred=True)
    (asked,) = plan.next(0)
    assert asked.peer == BOB


def test_wanting_again_changes_nothing() -> None:
    plan = plan_for(2, ALICE)
    plan.want(items(3))
    assert plan.bytes_total == 10 + 11 + 12


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 5))
def test_whatever_peers_do_everything_that_somebody_has_arrives_once(
    seed: int, count: int, peers: int
) -> None:
    rng = random.Random(seed)
    names = [PeerId(f"peer{i}") for i in range(peers)]
    wanted = items(count)
    has = {p: {k for k, _ in wanted if rng.random() < 0.7} for p in names}
    has[names[0]] = {k for k, _ in wanted}  # one honest peer has everything
    moody = {p: rng.choice(("good", "fails", "corrupt", "short", "leaves")) for p in names[1:]}
    plan = FetchPlan(wanted, BOUNDS)
    for p in names:
        plan.add_peer(p)
    got: list[bytes] = []
    under_way: list[Assignment[bytes]] = []
    now = 0.0
    for _ in range(10_000):
        under_way += plan.next(now)
        for p in names:
            load = sum(len(a.keys) for a in under_way if a.peer == p)
            assert load <= BOUNDS.in_flight or moody.get(p) in ("corrupt", "leaves", "fails")
        if plan.done:
            break
        if not under_way:
            assert plan.stuck() == []
            wake = plan.wake_at(now)
            assert wake is not None and wake > now
            now = wake
            continue
        a = under_way.pop(rng.randrange(len(under_way)))
        mood = moody.get(a.peer, "good") if rng.random() < 0.5 else "good"
        there = [k for k in a.keys if k in has[a.peer]]
        match mood:
            case "fails":
                plan.failed(a, now)
            case "corrupt":
                plan.corrupt(a)
            case "leaves":
                plan.drop_peer(a.peer)
            case "short":
                got += plan.arrived(a, there[:1])
                plan.answered(a)
            case "good":
                got += plan.arrived(a, there)
                plan.answered(a, [k for k in a.keys if k not in has[a.peer]])
        now += rng.random()
    assert sorted(got) == [k for k, _ in wanted]
    assert sum(plan.bytes_by_peer.values()) == plan.bytes_done == plan.bytes_total
