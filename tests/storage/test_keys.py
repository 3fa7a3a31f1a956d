"""Every key family: what goes in comes out, and the order of keys is the order of fields."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import LocalProtocolError
from protocols.ids import Subject, SubjectName
from storage import keys

U64 = st.integers(0, 2**64 - 1)
ID, HASH = st.binary(min_size=36, max_size=36), st.binary(min_size=32, max_size=32)
NUMBER = st.integers(0, 999_999)
SUBJECTS = st.one_of(
    st.sampled_from([SubjectName("embed"), SubjectName("final"), SubjectName("head")]),
    st.builds(SubjectName, st.sampled_from(["attention", "router", "shared", "mlp"]), NUMBER),
    st.builds(SubjectName, st.just("expert"), NUMBER, NUMBER),
).map(lambda name: Subject(str(name)))
PACKED = SUBJECTS.map(keys.pack_subject)

FIELDS = {
    "BLOCK": (ID,), "MANIFEST": (ID,), "LOG": (U64,), "MODEL": (ID,), "SUCCESSOR": (ID, ID),
    "RELEASE": (ID, ID), "STAGED": (ID, ID), "SUBJECTS": (ID,), "HEAD": (ID, PACKED),
    "PAST_HEAD": (ID, PACKED, U64), "ROOT": (HASH,), "PIN": (ID, st.integers(0, 255)),
    "CURSOR": (HASH, st.binary(min_size=16, max_size=16)), "AUTHOR": (HASH,), "CHUNK": (HASH,),
    "LEAVING": (U64, HASH), "DATA": (U64, HASH),
}  # fmt: skip


def test_every_family_is_tried_here() -> None:
    named = {n for n, value in vars(keys).items() if isinstance(value, keys.Family)}
    assert named == set(FIELDS)
    assert {getattr(keys, n) for n in FIELDS} == {*keys.INDEX_FAMILIES, keys.DATA}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_keys_round_trip_and_sort_as_their_fields(name: str) -> None:
    family = getattr(keys, name)

    @settings(max_examples=10_000 // len(FIELDS) + 1)
    @given(st.tuples(*FIELDS[name]), st.tuples(*FIELDS[name]))
    def check(a, b) -> None:
        assert family.parse(family.key(*a)) == a
        assert (family.key(*a) < family.key(*b)) == (a < b)
        assert len(family.key(*a)) == len(family.key(*b))
        assert family.key(*a).startswith(family.tag)

    check()


@settings(max_examples=10_000)
@given(SUBJECTS)
def test_subjects_round_trip(subject: Subject) -> None:
    packed = keys.pack_subject(subject)
    assert len(packed) == keys.SUBJECT_BYTES
    assert keys.unpack_subject(packed) == subject


@settings(max_examples=2_000)
@given(st.binary(max_size=80), st.sampled_from(sorted(FIELDS)))
def test_other_bytes_are_no_key_of_a_family(data: bytes, name: str) -> None:
    family = getattr(keys, name)
    try:
        fields = family.parse(data)
    except LocalProtocolError:
        return
    assert family.key(*fields) == data


@pytest.mark.parametrize("fields", [(b"short",), (bytes(37),), (7,), ()])
def test_a_field_of_another_width_is_our_bug(fields) -> None:
    with pytest.raises(LocalProtocolError, match="key"):
        keys.BLOCK.key(*fields)
