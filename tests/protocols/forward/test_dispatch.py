"""One layer gets served whatever happens on the way, or names what it could not get."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import limits
from protocols.errors import LocalProtocolError
from protocols.experts.routing import Links
from protocols.forward.dispatch import Dispatch, Send, Step, Unserved
from protocols.forward.grouping import Need
from protocols.ids import BlockId, PeerId, cid

BOB, CAROL, DAVE = PeerId("bob"), PeerId("carol"), PeerId("dave")


def block(n: int) -> BlockId:
    return BlockId(cid(b"expert %d" % n))


def need(expert: int, *rows: int) -> Need:
    return Need(expert, block(expert), rows, (0,) * len(rows))


class Table:
    """Who holds which expert; a test may change it on the way."""

    def __init__(self, **holders: list[int]) -> None:
        self.held = {PeerId(name): {block(n) for n in experts} for name, experts in holders.items()}

    def holders(self, wanted: BlockId) -> list[PeerId]:
        return sorted(peer for peer, blocks in self.held.items() if wanted in blocks)


def dispatch(table: Table, *needs: Need, hidden: int = 8) -> Dispatch:
    return Dispatch(needs, hidden=hidden, holders=table.holders, links=Links())


def peers(step: Step) -> list[tuple[str, list[int]]]:
    return [(send.peer, [need.expert for need in send.needs]) for send in step.send]


def test_four_experts_on_three_peers_are_three_messages() -> None:
    table = Table(bob=[0, 1], carol=[1, 2], dave=[2, 3])
    needs = [need(n, *range(16)) for n in range(4)]
    step = dispatch(table, *needs).start(0)
    assert len(step.send) <= 3
    assert len({send.peer for send in step.send}) == len(step.send)
    assert sorted(n.expert for send in step.send for n in send.needs) == [0, 1, 2, 3]


def test_a_dead_peer_is_replaced_at_once_with_the_same_rows() -> None:
    run = dispatch(Table(bob=[0], carol=[0]), need(0, 3, 5))
    [first] = run.start(0).send
    assert (first.peer, first.again) == (BOB, False)
    [second] = run.failed(first.ticket, 0.1).send
    assert (second.peer, second.again, second.needs) == (CAROL, True, first.needs)
    assert run.answered(second.ticket, 0.2) == (need(0, 3, 5),)
    assert run.done


def test_when_all_holders_have_failed_the_expert_is_handed_back() -> None:
    run = dispatch(Table(bob=[0, 1]), need(0, 1), need(1, 2))
    [send] = run.start(0).send
    step = run.failed(send.ticket, 0.1)
    assert step.send == ()
    assert step.events == (Unserved(need(0, 1), "no holder"), Unserved(need(1, 2), "no holder"))
    assert run.done


def test_without_any_holder_the_expert_is_handed_back_at_the_start() -> None:
    run = dispatch(Table(), need(0, 1))
    assert run.start(0).events == (Unserved(need(0, 1), "no holder"),)
    assert run.done


def test_a_holder_that_appears_meanwhile_is_used() -> None:
    table = Table(bob=[0])
    run = dispatch(table, need(0, 1))
    [send] = run.start(0).send
    table.held[DAVE] = {block(0)}
    assert peers(run.failed(send.ticket, 0.1)) == [("dave", [0])]


def test_not_held_moves_only_those_blocks() -> None:
    run = dispatch(Table(bob=[0, 1], carol=[0]), need(0, 1), need(1, 1))
    sends = {send.peer: send for send in run.start(0).send}
    run.answered(sends[CAROL].ticket, 0.1) if CAROL in sends else None
    step = run.not_held(sends[BOB].ticket, [block(1)], 0.1)
    assert [event.need.expert for event in step.events] == [1]


def test_a_busy_peer_is_passed_over_and_asked_again_later() -> None:
    run = dispatch(Table(bob=[0], carol=[0]), need(0, 1))
    [first] = run.start(0).send
    [second] = run.busy(first.ticket, 0.0).send
    assert second.peer == CAROL
    step = run.busy(second.ticket, 0.0)
    assert step.send == () and step.events == ()
    assert step.wake_at == pytest.approx(limits.busy_backoff_s)
    assert len(run.tick(limits.busy_backoff_s).send) == 1


def test_peers_that_stay_busy_end_in_a_named_refusal() -> None:
    run = dispatch(Table(bob=[0]), need(0, 1))
    step, now = run.start(0), 0.0
    while not step.events:
        assert now < 3 * limits.busy_s_max
        for send in step.send:
            step = run.busy(send.ticket, now)
        if not step.events:
            assert step.wake_at is not None
            now = step.wake_at
            step = run.tick(now)
    assert step.events == (Unserved(need(0, 1), "busy"),)
    assert now >= limits.busy_s_max


def test_a_late_reply_is_hedged_and_the_first_one_counts() -> None:
    run = dispatch(Table(bob=[0], carol=[0]), need(0, 1))
    start = run.start(0)
    [first] = start.send
    assert start.wake_at == limits.hedge_s_min
    assert run.tick(0.1).send == ()
    [second] = run.tick(0.25).send
    assert (second.peer, second.needs, second.again) == (CAROL, first.needs, True)
    assert run.answered(first.ticket, 0.3) == first.needs
    assert run.done
    assert run.answered(second.ticket, 0.4) == ()


def test_if_the_hedge_fails_the_late_one_still_counts() -> None:
    run = dispatch(Table(bob=[0], carol=[0]), need(0, 1))
    [first] = run.start(0).send
    [second] = run.tick(0.25).send
    step = run.failed(second.ticket, 0.3)
    assert (step.send, step.events, run.done) == ((), (), False)
    assert run.failed(first.ticket, 0.4).events == (Unserved(need(0, 1), "no holder"),)


def test_a_late_peer_is_not_hedged_without_another_holder_until_one_appears() -> None:
    table = Table(bob=[0])
    run = dispatch(table, need(0, 1))
    run.start(0)
    step = run.tick(0.25)
    assert step.send == () and step.wake_at == 0.5
    table.held[CAROL] = {block(0)}
    assert peers(run.tick(0.5)) == [("carol", [0])]


def test_messages_stay_within_the_limits_on_rows() -> None:
    rows = range(limits.activation_rows_max + 10)
    hidden = 4096
    run = dispatch(Table(bob=[0, 1]), need(0, *rows), need(1, *rows), hidden=hidden)
    sends = run.start(0).send
    for send in sends:
        assert send.rows * hidden * 4 <= limits.activation_bytes_max
        unique = {row for n in send.needs for row in n.rows}
        assert len(unique) <= limits.activation_rows_max
        assert len({n.block for n in send.needs}) == len(send.needs)
    served = [n for send in sends for n in run.answered(send.ticket, 0.1)]
    assert sorted((n.expert, row) for n in served for row in n.rows) == sorted(
        (expert, row) for expert in (0, 1) for row in rows
    )
    assert run.done


def test_a_reply_to_nothing_is_our_bug() -> None:
    run = dispatch(Table(bob=[0]), need(0, 1))
    with pytest.raises(LocalProtocolError, match="ticket 7"):
        run.answered(7, 0)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_whatever_happens_every_need_is_served_once_or_handed_back_once(seed: int) -> None:
    rng = random.Random(seed)
    experts = range(rng.randint(1, 6))
    names = ["bob", "carol", "dave", "erin"]
    held = {name: [n for n in experts if rng.random() < 0.6] for name in names}
    table = Table(**held)
    links = Links()
    needs = [need(n, *range(rng.randint(1, 40))) for n in experts]
    run = Dispatch(needs, hidden=8, holders=table.holders, links=links)
    open_: dict[int, Send] = {}
    settled: list[Need] = []
    now = 0.0
    kind = rng.choice(["kind", "cruel"])

    def take(step: Step) -> None:
        for send in step.send:
            assert send.ticket not in open_
            assert all(send.peer in table.holders(n.block) for n in send.needs)
            open_[send.ticket] = send
        settled.extend(event.need for event in step.events)

    take(step := run.start(now))
    while not run.done:
        assert now < 1000
        if not open_ or rng.random() < 0.2:
            if step.wake_at is not None:
                now = max(now, step.wake_at)
            take(step := run.tick(now))
            continue
        ticket = rng.choice(sorted(open_))
        send = open_.pop(ticket)
        now += rng.random() * 0.3
        roll = rng.random() if kind == "cruel" else 1.0
        if roll < 0.2:
            take(step := run.failed(ticket, now))
        elif roll < 0.4:
            take(step := run.busy(ticket, now))
        elif roll < 0.6:
            missing = rng.sample([n.block for n in send.needs], 1)
            take(step := run.not_held(ticket, missing, now))
        else:
            settled.extend(run.answered(ticket, now))
            step = run.tick(now)
            take(step)
    assert sorted(n.expert for n in settled) == list(experts)
    if kind == "kind":
        assert all(table.holders(n.block) for n in settled) or not all(
            table.holders(n.block) for n in needs
        )
    run.close()
    assert all(links.link(PeerId(name)).rows_in_flight == 0 for name in names)


def test_a_busy_peer_is_waited_for_although_others_have_answered_since() -> None:
    run = dispatch(Table(bob=[0, 2], carol=[1], dave=[2]), need(0, 1), need(1, 2), need(2, 3))
    sends = {expert.expert: send for send in run.start(0).send for expert in send.needs}
    assert (sends[0].peer, sends[2].peer) == (BOB, DAVE)
    assert run.busy(sends[0].ticket, 0.0).events == ()
    assert run.answered(sends[1].ticket, 0.001)
    step = run.failed(sends[2].ticket, 0.002)  # now only bob has what dave had
    assert step.events == () and step.wake_at == pytest.approx(limits.busy_backoff_s)
    [again] = run.tick(limits.busy_backoff_s).send
    assert again.peer == BOB and {n.expert for n in again.needs} == {0, 2}
