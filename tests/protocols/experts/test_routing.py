"""The holder that is expected to be done first computes; the late and the failed come last."""

from collections.abc import Sequence
from dataclasses import dataclass

from protocols import limits
from protocols.experts.routing import Links, choose
from protocols.ids import PeerId

BOB, CAROL, DAVE = PeerId("bob"), PeerId("carol"), PeerId("dave")


@dataclass(frozen=True)
class Rows:
    expert: int
    rows: tuple[int, ...]


def pick(
    links: Links, peers: Sequence[PeerId], *needs: Rows, now: float = 0
) -> dict[str, list[int]]:
    chosen, left = choose(needs, lambda _: peers, links, now)
    assert not left
    return {peer: sorted(need.expert for need in mine) for peer, mine in chosen.items()}


def test_the_faster_peer_is_chosen() -> None:
    links = Links()
    for _ in range(20):
        links.measured(BOB, 1, 0.050, 0)
        links.measured(CAROL, 1, 0.002, 0)
    assert pick(links, [BOB, CAROL], Rows(0, (0,))) == {CAROL: [0]}


def served(links: Links, times: dict[PeerId, float], row: float, now: float) -> PeerId:
    """One row goes to the peer that is chosen, which takes its time."""
    (peer,) = pick(links, list(times), Rows(0, (0,)), now=now)
    links.measured(PeerId(peer), 1, times[PeerId(peer)] + row, now)
    return PeerId(peer)


def test_a_peer_that_was_slow_once_is_tried_again_and_one_that_is_slow_seldom() -> None:
    """A message every 50 ms: who has recovered takes part again; who has not is asked seldom."""
    links, now = Links(), 0.0
    for peer in (BOB, CAROL, DAVE):
        links.measured(peer, 1, 0.002 if peer == CAROL else 0.5, now)
        links.measured(peer, 100, 0.002 if peer == CAROL else 60.0, now)
    times = {BOB: 0.001, CAROL: 0.002, DAVE: 0.5}
    chosen = []
    for _ in range(2400):
        now += 0.05
        chosen.append(served(links, times, 0.0001, now))
    assert chosen[:20] == [CAROL] * 20
    assert chosen[-20:].count(BOB) >= 19
    assert 1 <= chosen.count(DAVE) <= 6


def test_load_moves_work_to_the_other_peer() -> None:
    links = Links()
    assert pick(links, [BOB, CAROL], Rows(0, (0,))) == {BOB: [0]}
    links.sent(BOB, 50)
    assert pick(links, [BOB, CAROL], Rows(0, (0,))) == {CAROL: [0]}
    links.ended(BOB, 50)
    assert pick(links, [BOB, CAROL], Rows(0, (0,))) == {BOB: [0]}


def test_many_rows_are_shared_out() -> None:
    needs = [Rows(n, tuple(range(32))) for n in range(4)]
    assert pick(Links(), [BOB, CAROL], *needs) == {BOB: [0, 2], CAROL: [1, 3]}


def test_a_suspect_is_the_last_choice_for_a_while() -> None:
    links = Links()
    links.suspect(BOB, 100)
    assert pick(links, [BOB, CAROL], Rows(0, (0,)), now=101) == {CAROL: [0]}
    assert pick(links, [BOB], Rows(0, (0,)), now=101) == {BOB: [0]}
    after = 100 + limits.suspect_s
    assert pick(links, [BOB, CAROL], Rows(0, (0,)), now=after) == {BOB: [0]}


def test_needs_without_holder_are_handed_back() -> None:
    need = Rows(0, (0,))
    assert choose([need], lambda _: [], Links(), 0) == ({}, [need])


def test_late_is_a_multiple_of_the_usual_and_never_hasty() -> None:
    links = Links()
    assert links.late_after_s(BOB, 1) == limits.hedge_s_min
    for _ in range(100):
        links.measured(BOB, 1, 0.5, 0)
    assert 1.9 < links.late_after_s(BOB, 1) < 2.1


def test_hedges_are_a_small_share_of_the_messages() -> None:
    links = Links()
    assert sum(links.may_hedge() for _ in range(100)) == int(limits.hedge_budget_max)
    for _ in range(100):
        links.sent(BOB, 1)
    assert sum(links.may_hedge() for _ in range(100)) in (7, 8)


def test_records_are_bounded_and_those_in_use_stay() -> None:
    links = Links()
    links.sent(BOB, 2)
    for n in range(limits.links_max + 10):
        links.measured(PeerId(f"peer{n}"), 1, 9.0, 0)
    assert links.link(BOB).rows_in_flight == 2
    assert links.link(PeerId("peer1")).base_s < 1 < links.link(PeerId("peer1000")).base_s
