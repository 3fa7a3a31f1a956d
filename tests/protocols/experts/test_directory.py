"""The directory believes the newest advert of each peer, and each for its lifetime alone."""

import pytest

from protocols import limits
from protocols.experts.advert import Advert, HeldExpert, pack_held
from protocols.experts.directory import Directory
from protocols.ids import BlockId, NetworkId, cid
from protocols.signing import Identity

NET = NetworkId(cid(b"network"))
ALICE = Identity.from_seed(b"a" * 32)
BOB = Identity.from_seed(b"b" * 32)
MODEL = BlockId(cid(b"model"))
OLD = BlockId(cid(b"old"))
NEW = BlockId(cid(b"new"))


def advert(identity: Identity, seq: int, *blocks: BlockId, lifetime_s: int = 20) -> Advert:
    return Advert(
        net=NET,
        key=identity.public,
        seq=seq,
        lifetime_s=lifetime_s,
        role="gpu",
        profile="cpu",
        models=pack_held(HeldExpert(MODEL, 0, n, block) for n, block in enumerate(blocks)),
    )


def test_the_newest_advert_of_a_peer_stands_for_all_it_holds() -> None:
    directory = Directory()
    assert directory.apply(advert(ALICE, 1, OLD), 0)
    assert directory.apply(advert(BOB, 1, OLD), 0)
    assert directory.holders(OLD) == sorted([ALICE.peer_id, BOB.peer_id])
    assert directory.apply(advert(ALICE, 2, NEW), 0)
    assert directory.holders(OLD) == [BOB.peer_id]
    assert directory.holders(NEW) == [ALICE.peer_id]
    assert not directory.apply(advert(ALICE, 1, OLD), 0)
    assert not directory.apply(advert(ALICE, 2, OLD), 0)
    assert directory.holders(NEW) == [ALICE.peer_id]


def test_an_advert_expires_by_the_receivers_clock() -> None:
    directory = Directory()
    directory.apply(advert(ALICE, 1, OLD, lifetime_s=20), 100)
    directory.apply(advert(BOB, 1, OLD, lifetime_s=10), 100)
    assert directory.expire(109.9) == []
    assert directory.expire(110) == [BOB.peer_id]
    assert directory.holders(OLD) == [ALICE.peer_id]
    assert directory.expire(120) == [ALICE.peer_id]
    assert directory.holders(OLD) == []


def test_a_withdrawal_removes_and_older_adverts_do_not_bring_back() -> None:
    directory = Directory()
    directory.apply(advert(ALICE, 5, OLD), 0)
    assert directory.apply(advert(ALICE, 6, lifetime_s=0), 1)
    assert directory.holders(OLD) == []
    assert directory.advert(ALICE.peer_id) is None
    assert not directory.apply(advert(ALICE, 5, OLD), 2)
    assert directory.holders(OLD) == []
    assert directory.apply(advert(ALICE, 7, OLD), 3)
    assert directory.holders(OLD) == [ALICE.peer_id]


def test_a_lost_peer_is_forgotten_until_it_speaks_again() -> None:
    directory = Directory()
    directory.apply(advert(ALICE, 5, OLD), 0)
    assert directory.remove(ALICE.peer_id)
    assert not directory.remove(ALICE.peer_id)
    assert not directory.apply(advert(ALICE, 5, OLD), 1)
    assert directory.apply(advert(ALICE, 6, OLD), 1)


def test_experts_are_listed_with_their_holders() -> None:
    directory = Directory()
    directory.apply(advert(ALICE, 1, OLD, NEW), 0)
    directory.apply(advert(BOB, 1, OLD), 0)
    both = sorted([ALICE.peer_id, BOB.peer_id])
    assert list(directory.experts(MODEL)) == [
        (HeldExpert(MODEL, 0, 0, OLD), both),
        (HeldExpert(MODEL, 0, 1, NEW), [ALICE.peer_id]),
    ]
    assert list(directory.experts(OLD)) == []


def test_the_number_of_adverts_is_bounded() -> None:
    directory = Directory()
    for n in range(limits.adverts_max):
        seed = n.to_bytes(32, "big")
        assert directory.apply(advert(Identity.from_seed(seed), 1, OLD), n / 100)
    assert not directory.apply(advert(ALICE, 1, OLD), 15)
    assert directory.apply(advert(ALICE, 1, OLD), 20.5)


def test_strangers_fill_no_more_than_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "advertised_experts_max", 5)
    strangers = [Identity.from_seed(bytes([n]) * 32) for n in range(1, 6)]
    directory = Directory(lambda peer: peer in (ALICE.peer_id, BOB.peer_id))
    assert all(directory.apply(advert(one, 1, OLD), 0) for one in strangers)
    assert not directory.apply(advert(Identity.from_seed(b"s" * 32), 1, OLD), 0)
    assert directory.apply(advert(ALICE, 1, OLD, NEW), 1)
    assert directory.apply(advert(BOB, 1, NEW), 1)
    assert len(directory.adverts()) == 4 and directory.advert(strangers[2].peer_id) is None
    assert directory.apply(advert(ALICE, 2, *[NEW] * 4), 2)
    assert set(directory.adverts()) == {ALICE.peer_id, BOB.peer_id}
    assert not directory.apply(advert(BOB, 2, OLD, NEW), 2)
    assert directory.apply(advert(ALICE, 3, lifetime_s=0), 3)
    assert directory.apply(advert(strangers[0], 2, *[NEW] * 4), 3)


def test_strangers_leave_room_for_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "adverts_max", 1)
    directory = Directory(lambda peer: peer == ALICE.peer_id)
    assert directory.apply(advert(BOB, 1, OLD), 0)
    assert directory.apply(advert(ALICE, 1, OLD), 0)
    assert directory.holders(OLD) == [ALICE.peer_id]
    assert not directory.apply(advert(BOB, 2, OLD), 0)


def test_what_a_peer_denies_it_holds_again_with_its_next_advert() -> None:
    directory = Directory()
    directory.apply(advert(ALICE, 1, OLD, NEW), 0)
    directory.disown(ALICE.peer_id, OLD)
    directory.disown(BOB.peer_id, OLD)
    assert directory.holders(OLD) == [] and directory.holders(NEW) == [ALICE.peer_id]
    assert {held.block for held in directory.held(ALICE.peer_id)} == {NEW}
    assert directory.held(BOB.peer_id) == frozenset()
    directory.apply(advert(ALICE, 2, OLD), 1)
    assert directory.holders(OLD) == [ALICE.peer_id]
    directory.disown(ALICE.peer_id, OLD)
    assert directory.remove(ALICE.peer_id) and directory.holders(OLD) == []
