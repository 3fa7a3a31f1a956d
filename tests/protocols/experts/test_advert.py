"""Adverts say exactly what is held, by whom, and are refused in every other form."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols import limits, wire
from protocols.errors import RemoteProtocolError
from protocols.experts.advert import Advert, HeldExpert, SignedAdvert, pack_held
from protocols.ids import BlockId, NetworkId, cid
from protocols.signing import ADVERT_TAG, Identity

NET = NetworkId(cid(b"network"))
ALICE = Identity.from_seed(b"a" * 32)
BOB = Identity.from_seed(b"b" * 32)


def block(*parts: object) -> BlockId:
    return BlockId(cid(repr(parts).encode()))


def advert(identity: Identity = ALICE, **fields: object) -> Advert:
    defaults: dict[str, object] = {
        "net": NET,
        "key": identity.public,
        "seq": 1,
        "lifetime_s": 20,
        "role": "gpu",
        "profile": "cpu",
    }
    return Advert(**{**defaults, **fields})  # type: ignore[arg-type]


held_experts = st.sets(
    st.builds(
        HeldExpert,
        st.sampled_from([block("model", n) for n in range(3)]),
        st.integers(0, 5),
        st.integers(0, 40),
        st.sampled_from([block("version", n) for n in range(3)]),
    ),
    max_size=60,
)


@given(held_experts)
def test_what_is_held_comes_back_whole(held: set[HeldExpert]) -> None:
    signed = SignedAdvert.create(advert(models=pack_held(held)), ALICE)
    again = SignedAdvert.decode(signed.encode(), net=NET)
    assert again == signed
    assert set(again.advert.held()) == held
    assert again.advert.peer == ALICE.peer_id


def test_another_peers_advert_cannot_be_made() -> None:
    raw = wire.encode(advert(ALICE))
    forged = wire.encode([raw, BOB.sign(ADVERT_TAG, raw)])
    with pytest.raises(RemoteProtocolError, match="signature does not hold"):
        SignedAdvert.decode(forged, net=NET)


def test_a_signature_for_another_purpose_does_not_count() -> None:
    raw = wire.encode(advert(ALICE))
    forged = wire.encode([raw, ALICE.sign(b"blyan/block/1", raw)])
    with pytest.raises(RemoteProtocolError, match="signature does not hold"):
        SignedAdvert.decode(forged, net=NET)


def test_another_networks_advert_is_refused() -> None:
    data = SignedAdvert.create(advert(), ALICE).encode()
    with pytest.raises(RemoteProtocolError, match="another network"):
        SignedAdvert.decode(data, net=NetworkId(cid(b"elsewhere")))


ONE = pack_held([HeldExpert(block("model", 0), 0, 3, block("version", 0))])


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"v": 2}, "version 2"),
        ({"seq": 0}, "sequence"),
        ({"lifetime_s": limits.advert_lifetime_s + 1}, "lifetime"),
        ({"lifetime_s": 0, "models": ONE}, "withdrawal"),
        ({"profile": "x" * 65}, "profile"),
        ({"queue": -1}, "queue"),
        ({"memory_free": -1}, "queue or free memory"),
        ({"models": ONE + ONE}, "not sorted"),
        ({"models": [[block(1), []]]}, "layers are missing"),
        ({"models": [[block(1), [[-1, b"\1", [block(2)]]]]]}, "layer number"),
        ({"models": [[block(1), [[0, b"", []]]]]}, "bad length"),
        ({"models": [[block(1), [[0, b"\1\0", [block(2)]]]]]}, "bad length"),
        ({"models": [[block(1), [[0, b"\3", [block(2)]]]]]}, "do not fit"),
        ({"models": [[block(1), [[0, b"\1", [b"x" * 36]]]]]}, "not a block id"),
        ({"models": [[block(1), [[0, b"\1", [block(2)]]] * 2]]}, "twice"),
    ],
)
def test_malformed_adverts_are_refused_by_name(fields: dict[str, object], why: str) -> None:
    raw = wire.encode(advert(**fields))
    data = wire.encode([raw, ALICE.sign(ADVERT_TAG, raw)])
    with pytest.raises(RemoteProtocolError, match=why):
        SignedAdvert.decode(data, net=NET)


def test_ten_thousand_broken_adverts_are_one_kind_of_error() -> None:
    rng = random.Random(1)
    held = [HeldExpert(block("model", 0), n % 4, n, block(n)) for n in range(12)]
    good = SignedAdvert.create(advert(models=pack_held(held)), ALICE).encode()
    refused = 0
    for _ in range(10_000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        if rng.random() < 0.1:
            data = bytearray(rng.randbytes(rng.randrange(200)))
        if bytes(data) == good:
            continue
        with pytest.raises(RemoteProtocolError, match="advert"):
            SignedAdvert.decode(bytes(data), net=NET)
        refused += 1
    assert refused > 9_900


@settings(max_examples=50)
@given(held_experts)
def test_the_packed_form_does_not_depend_on_the_order(held: set[HeldExpert]) -> None:
    assert pack_held(sorted(held)) == pack_held(sorted(held, reverse=True))
