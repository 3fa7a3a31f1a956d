"""Every key family: what goes in comes out, and the order of keys is the order of fields."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import LocalProtocolError
from protocols.ids import Subject, SubjectName
from storage import keys

CASES = 10_000
Draw = Callable[[random.Random], Any]


def number(bits: int) -> Draw:
    """Small and large numbers alike."""
    return lambda rng: rng.getrandbits(rng.randint(1, bits))


def data(length: int) -> Draw:
    """Bytes that often share a beginning."""
    return lambda rng: bytes(rng.randint(0, length)).ljust(length, b"x")[:-2] + rng.randbytes(2)


def subject(rng: random.Random) -> Subject:
    """Any subject, with the largest numbers too."""
    layer, expert = (rng.choice([0, rng.randrange(100), rng.randrange(1_000_000)]) for _ in "12")
    kind = rng.choice(keys._SUBJECT_KINDS)
    if kind in ("embed", "final", "head"):
        return Subject(kind)
    return Subject(str(SubjectName(kind, layer, expert if kind == "expert" else None)))


def packed(rng: random.Random) -> bytes:
    """A subject as it is in a key."""
    return keys.pack_subject(subject(rng))


ID, HASH, U64 = data(36), data(32), number(64)
FIELDS: dict[str, tuple[Draw, ...]] = {
    "BLOCK": (ID,), "MANIFEST": (ID,), "LOG": (U64,), "MODEL": (ID,), "SUCCESSOR": (ID, ID),
    "RELEASE": (ID, ID), "STAGED": (ID, ID), "SUBJECTS": (ID,), "HEAD": (ID, packed),
    "PAST_HEAD": (ID, packed, U64), "ROOT": (HASH,), "PIN": (ID, number(8)),
    "CURSOR": (HASH, data(16)), "AUTHOR": (HASH,), "CHUNK": (HASH,), "LEAVING": (U64, HASH),
    "DATA": (U64, HASH),
}  # fmt: skip


def test_every_family_is_tried_here() -> None:
    named = {n for n, value in vars(keys).items() if isinstance(value, keys.Family)}
    assert named == set(FIELDS)
    assert {getattr(keys, n) for n in FIELDS} == {*keys.INDEX_FAMILIES, keys.DATA}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_keys_round_trip_and_sort_as_their_fields(name: str) -> None:
    family = getattr(keys, name)
    rng = random.Random(name)
    for _ in range(CASES):
        a, b = (tuple(draw(rng) for draw in FIELDS[name]) for _ in "ab")
        one, other = family.key(*a), family.key(*b)
        assert family.parse(one) == a
        assert (one < other) == (a < b)
        assert len(one) == len(other) and one.startswith(family.tag)
        assert one.startswith(family.prefix(*(f for f in a[:1] if isinstance(f, bytes))))


def test_subjects_round_trip() -> None:
    rng = random.Random(1)
    for _ in range(CASES):
        name = subject(rng)
        assert len(keys.pack_subject(name)) == keys.SUBJECT_BYTES
        assert keys.unpack_subject(keys.pack_subject(name)) == name


@settings(max_examples=500)
@given(st.binary(max_size=80), st.sampled_from(sorted(FIELDS)))
def test_other_bytes_are_no_key_of_a_family(raw: bytes, name: str) -> None:
    family = getattr(keys, name)
    try:
        fields = family.parse(raw)
    except LocalProtocolError:
        return
    assert family.key(*fields) == raw


@pytest.mark.parametrize("fields", [(b"short",), (bytes(37),), (7,), ()])
def test_a_field_of_another_width_is_our_bug(fields: tuple[object, ...]) -> None:
    with pytest.raises(LocalProtocolError, match="key"):
        keys.BLOCK.key(*fields)
