"""Genesis files and release bodies: strict on the way in, one form on the way out."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blyan_node.testing.blocks import Author
from protocols import limits, wire
from protocols.dag.genesis import DEVELOPMENT, GENESIS_FILE_BYTES_MAX, Genesis
from protocols.dag.order import graphviz
from protocols.dag.release import decode_release, encode_release
from protocols.dag.update import require_head
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import BlockId, Subject, cid, cid_text

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True)
parameters = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True), st.integers(-(2**53) + 1, 2**53 - 1)
)


@given(names, st.binary(min_size=16, max_size=16), parameters)
def test_a_genesis_file_comes_back_as_it_was(
    name: str, nonce: bytes, extra: dict[str, int]
) -> None:
    genesis = Genesis(name, nonce, extra)
    again = Genesis.from_json(genesis.to_json())
    assert again == genesis and again.id == genesis.id


def test_the_id_covers_everything() -> None:
    one = Genesis("a", bytes(16), {"x": 1})
    others = (Genesis("b", bytes(16), {"x": 1}), Genesis("a", b"1" * 16, {"x": 1}))
    assert len({g.id for g in (one, *others, Genesis("a", bytes(16), {"x": 2}))}) == 4
    assert DEVELOPMENT.id == DEVELOPMENT.check().id


def edited(**changes: object) -> str:
    return json.dumps(json.loads(DEVELOPMENT.to_json()) | changes)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "genesis"),
        ("[]", "genesis"),
        (edited(more=1), "unknown field"),
        (edited(name="other"), "does not fit"),
        (edited(name="UPPER"), "not a network name"),
        (edited(name=5), "genesis"),
        (edited(id="bafk"), "does not fit"),
        (edited(nonce="00"), "32 hex"),
        (edited(nonce="0" * 31 + "G"), "32 hex"),
        (edited(parameters={"x": 1}), "does not fit"),
        (edited(parameters={"x": 1.5}), "genesis"),
        (edited(parameters={"x": 2**70}), "genesis"),
        (edited(parameters={"X": 1}), "out of form"),
        (edited(parameters={f"p{i}": i for i in range(65)}), "65 entries"),
        (" " * (GENESIS_FILE_BYTES_MAX + 1), "over"),
        ("[" * 10_000, "genesis"),
        ('{"name": "\\ud800"}', "genesis"),
    ],
)
def test_bad_genesis_files(text: str, match: str) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        Genesis.from_json(text)


def test_fuzz_genesis_files() -> None:
    rng = random.Random(3)
    seed = DEVELOPMENT.to_json().encode()
    for case in range(10_000):
        data = bytearray(seed)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                del data[at : at + rng.randint(1, 5)]
        raw = rng.randbytes(rng.randint(0, 100)) if case % 5 == 0 else bytes(data)
        try:
            genesis = Genesis.from_json(raw)
        except RemoteProtocolError as error:
            assert error.where.startswith("genesis")
        else:
            assert genesis == DEVELOPMENT  # only white space was touched


SUBJECTS = st.sampled_from(["embed", "head", "layer0.router", "layer1.expert7", "layer20.shared"])


@given(st.dictionaries(SUBJECTS, st.binary(max_size=8).map(cid), min_size=1))
def test_a_release_body_comes_back_as_it_was(listed: dict[str, bytes]) -> None:
    subjects = {Subject(s): BlockId(id) for s, id in listed.items()}
    assert decode_release(encode_release(subjects)) == subjects


ID = cid(b"x")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (wire.encode({}), "0 subjects"),
        (wire.encode({"nobody": ID}), "names no part"),
        (wire.encode({"embed": ID[1:]}), "not a block id"),
        (wire.encode({"embed": 5}), "release body"),
        (wire.encode([ID]), "release body"),
        (b"", "release body"),
        (b"\x82" + wire.encode("head") + wire.encode(ID) + wire.encode("embed") + wire.encode(ID),
         "canonical"),
        (b"\x82" + (wire.encode("embed") + wire.encode(ID)) * 2, "canonical"),
        (bytes(limits.release_body_bytes_max + 1), "at most"),
    ],
)  # fmt: skip
def test_bad_release_bodies(data: bytes, match: str) -> None:
    with pytest.raises(RemoteProtocolError, match=match):
        decode_release(data)


@settings(max_examples=1_000)
@given(st.binary(max_size=200))
def test_noise_is_no_release(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        decode_release(data)


def test_compare_and_swap_names_the_current_head() -> None:
    heads = {Subject("embed"): BlockId(cid(b"2"))}
    assert require_head(heads, Subject("embed"), None) == cid(b"2")
    assert require_head(heads, Subject("embed"), BlockId(cid(b"2"))) == cid(b"2")
    with pytest.raises(Refused, match="its head is") as stale:
        require_head(heads, Subject("embed"), BlockId(cid(b"1")))
    assert stale.value.code is ErrorCode.STALE_BASE
    assert stale.value.data["head"] == cid_text(cid(b"2"))
    with pytest.raises(Refused, match="no subject head") as unknown:
        require_head(heads, Subject("head"), None)
    assert unknown.value.code is ErrorCode.NOT_FOUND


def test_the_picture_names_every_block_and_marks_heads() -> None:
    alice = Author("alice")
    published = alice.publish()
    update = alice.update(published[1], b"new")
    blocks = [m.block for m in (*published, update)]
    text = graphviz(blocks, {published[0].id: {Subject("embed"): update.id}})
    assert text.startswith("digraph") and text.endswith("}\n")
    for made in (*published, update):
        assert cid_text(made.id) in text
    assert text.count("penwidth=3") == 1 and text.count("style=dashed") == 1
    assert graphviz(reversed(blocks), {published[0].id: {Subject("embed"): update.id}}) == text
