"""Every malformed header is refused at its stage, with one type of error."""

import random
from typing import Any

import msgspec
import pytest

from blyan_node.testing.blocks import NOW_MS, Author, identity
from protocols import limits, wire
from protocols.dag.genesis import DEVELOPMENT, Genesis
from protocols.dag.header import Block, Chain, Header, Kind
from protocols.dag.validate import Stage, decode_block, decode_blocks, is_staged, kind_of, stage_of
from protocols.errors import NotYet, RemoteProtocolError
from protocols.ids import BlockId, Subject, cid
from protocols.signing import BLOCK_TAG
from protocols.tensors.manifest import Manifest

NET = DEVELOPMENT.id
ALICE = Author("alice")
MODEL = ALICE.model()
PART = ALICE.part(MODEL.id, "layer3.expert5")
RELEASE = ALICE.release(MODEL.id, [PART])
LATER = NOW_MS + 1_000


def check(data: bytes) -> Block:
    return decode_block(data, network=NET, now_ms=LATER)


def sign(header: Header) -> bytes:
    raw = wire.encode(header)
    sig = identity("alice").sign(BLOCK_TAG, cid(raw))
    return wire.encode([raw, sig])


def altered(block: Block, **changes: Any) -> bytes:
    """A block with other fields, well signed."""
    return sign(msgspec.structs.replace(block.header, **changes))


def refused(data: bytes, stage: Stage, match: str | None = None) -> None:
    with pytest.raises(RemoteProtocolError, match=match) as caught:
        check(data)
    assert stage_of(caught.value) is stage


@pytest.mark.parametrize("made", [MODEL, PART, RELEASE], ids=["model", "part", "release"])
def test_a_good_block_comes_back_as_it_was(made: Any) -> None:
    assert check(made.block.encode()) == made.block


def test_many_at_once_come_back_in_their_order() -> None:
    blocks = [RELEASE.block, MODEL.block, PART.block]
    page = [block.encode() for block in blocks]
    assert decode_blocks(page, network=NET, now_ms=LATER) == blocks
    assert decode_blocks([], network=NET, now_ms=LATER) == []


@pytest.mark.parametrize("place", range(3))
def test_one_bad_block_among_many_is_refused_at_its_stage(place: int) -> None:
    page = [block.encode() for block in (MODEL.block, PART.block, RELEASE.block)]
    for stage, bad in (
        (Stage.DECODE, b"\xc1"),
        (Stage.NETWORK, altered(PART.block, v=2)),
        (Stage.SIGNATURE, wire.encode([PART.block.raw, bytes(64)])),
        (Stage.KIND, altered(PART.block, time=LATER + limits.clock_drift_ms_max + 1)),
    ):
        with pytest.raises(RemoteProtocolError) as caught:
            decode_blocks([*page[:place], bad, *page[place:]], network=NET, now_ms=LATER)
        assert stage_of(caught.value) is stage


def test_no_signature_of_a_page_is_looked_at_while_a_block_of_it_is_malformed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[BlockId] = []
    monkeypatch.setattr(Block, "signature_holds", lambda block: looked.append(block.id) or True)
    with pytest.raises(RemoteProtocolError, match="block/decode"):
        decode_blocks([MODEL.block.encode(), b"\xc1"], network=NET, now_ms=LATER)
    assert looked == []


def test_oversize() -> None:
    refused(b"x" * (limits.signed_header_bytes_max + 1), Stage.SIZE, "at most")
    big = altered(MODEL.block, meta={f"k{i}": "v" * 4_000 for i in range(5)})
    refused(big, Stage.SIZE, "at most")


def test_another_network_and_version() -> None:
    other = Genesis("other", b"0123456789abcdef").id
    refused(altered(MODEL.block, net=other), Stage.NETWORK, "another network")
    refused(altered(MODEL.block, v=2), Stage.NETWORK, "header version 2")


def test_forged() -> None:
    signed = wire.encode([MODEL.block.raw, identity("mallory").sign(BLOCK_TAG, MODEL.id)])
    refused(signed, Stage.SIGNATURE, "not the author's")
    advert = wire.encode([MODEL.block.raw, identity("alice").sign(b"blyan/advert/1", MODEL.id)])
    refused(advert, Stage.SIGNATURE, "not the author's")
    by_mallory = altered(MODEL.block, author=identity("mallory").public)
    refused(by_mallory, Stage.SIGNATURE, "not the author's")
    refused(altered(MODEL.block, author=b"short"), Stage.SIGNATURE, "not the author's")
    small_order = altered(MODEL.block, author=b"\1" + b"\0" * 31)
    refused(small_order, Stage.SIGNATURE, "not the author's")


ID = MODEL.id
OTHER = BlockId(cid(b"another"))
BAD_FIELDS: list[tuple[Any, dict[str, Any], str]] = [
    (MODEL, {"chain": Chain.B}, "does not belong in chain B"),
    (PART, {"chain": Chain.A}, "does not belong in chain A"),
    (MODEL, {"seq": -1}, "seq is out of range"),
    (MODEL, {"seq": 2**63}, "seq is out of range"),
    (MODEL, {"time": -1}, "time is out of range"),
    (MODEL, {"time": 2**64 - 1}, "time is out of range"),
    (MODEL, {"time": LATER + limits.clock_drift_ms_max + 1}, "in the future"),
    (MODEL, {"size": -1}, "size is out of range"),
    (MODEL, {"size": 2**53}, "size is out of range"),
    (MODEL, {"depends_on": tuple(sorted(cid(b"%d" % i) for i in range(65)))}, "65 parents"),
    (MODEL, {"depends_on": (b"x",)}, "not a block id"),
    (MODEL, {"depends_on": (b"\2" + ID[1:],)}, "not a block id"),
    (MODEL, {"depends_on": tuple(sorted((ID, OTHER), reverse=True))}, "not sorted"),
    (MODEL, {"depends_on": (ID, ID)}, "repeated"),
    (MODEL, {"body": None}, "body is not"),
    (MODEL, {"body": b"\0" * 36}, "body is not"),
    (PART, {"model": OTHER}, "model is not among its parents"),
    (PART, {"base": OTHER}, "base is not among its parents"),
    (MODEL, {"meta": {f"k{i}": 1 for i in range(33)}}, "33 entries"),
    (MODEL, {"meta": {"": 1}}, "empty or too long"),
    (MODEL, {"meta": {"k" * 65: 1}}, "empty or too long"),
    (MODEL, {"meta": {"k": "v" * 4097}}, "4097 characters"),
    (MODEL, {"meta": {"k": 2**60}}, "out of range"),
    (MODEL, {"model": ID, "depends_on": (ID,)}, "no model, subject or base"),
    (MODEL, {"subject": "embed"}, "no model, subject or base"),
    (MODEL, {"base": ID, "depends_on": (ID,)}, "no model, subject or base"),
    (MODEL, {"meta": {"family": "mixtral"}}, "needs a name"),
    (MODEL, {"meta": {"family": "mixtral", "name": 5}}, "needs a name"),
    (MODEL, {"meta": {"family": "mixtral", "name": "Big"}}, "needs a name"),
    (MODEL, {"meta": {"family": "mixtral", "name": "a\n"}}, "needs a name"),
    (MODEL, {"meta": {"name": "a"}}, "needs a family"),
    (MODEL, {"meta": {"name": "a", "family": "mixtral", "staged": 1}}, "only parameters"),
    (RELEASE, {"model": None, "depends_on": ()}, "a release has a model"),
    (RELEASE, {"subject": "embed"}, "no subject"),
    (RELEASE, {"meta": {"staged": 1}}, "only parameters"),
    (PART, {"model": None, "depends_on": ()}, "has a model and a subject"),
    (PART, {"subject": None}, "has a model and a subject"),
    (PART, {"subject": "layer3.expert05"}, "names no part"),
    (PART, {"subject": "layer3.router"}, "not the subject of a expert block"),
    (PART, {"meta": {"staged": 2}}, "staged is 1"),
    (PART, {"meta": {"staged": "1"}}, "staged is 1"),
    (PART, {"meta": {}}, "without a base"),
]


@pytest.mark.parametrize(("made", "changes", "match"), BAD_FIELDS)
def test_each_malformed_field(made: Any, changes: dict[str, Any], match: str) -> None:
    refused(altered(made.block, **changes), Stage.KIND, match)


def test_time_may_be_ahead_by_the_drift_and_as_old_as_it_likes() -> None:
    check(altered(MODEL.block, time=LATER + limits.clock_drift_ms_max))
    check(altered(MODEL.block, time=0))


def test_who_passes_on_what_is_early_by_our_clock_may_have_the_right_one() -> None:
    drift = limits.clock_drift_ms_max
    for early in (LATER + drift + 1, LATER + 2 * drift):
        with pytest.raises(NotYet, match="in the future"):
            check(altered(MODEL.block, time=early))
    for bad in (
        altered(MODEL.block, time=LATER + 2 * drift + 1),
        altered(MODEL.block, time=LATER + drift + 1, body=None),  # early, and wrong besides
    ):
        with pytest.raises(RemoteProtocolError) as refused:
            check(bad)
        assert not isinstance(refused.value, NotYet)
    page = [altered(MODEL.block, time=LATER + drift + 1), altered(MODEL.block, body=None)]
    with pytest.raises(RemoteProtocolError, match="body is not"):
        decode_blocks(page, network=NET, now_ms=LATER)


RAW = msgspec.msgpack.decode(MODEL.block.raw)


def test_wrong_types_and_missing_and_unknown_fields() -> None:
    for name in RAW:
        fewer = {k: v for k, v in RAW.items() if k != name}
        refused(sign_raw(fewer), Stage.DECODE)
        for value in ([1], {"a": []}, True, 1.5, {"k": b""}):
            refused(sign_raw(RAW | {name: value}), Stage.DECODE)
    refused(sign_raw(RAW | {"more": 1}), Stage.DECODE, "unknown field")
    refused(sign_raw(RAW | {"meta": {"k": 1.0}}), Stage.DECODE)
    refused(sign_raw(RAW | {"meta": {"k": None}}), Stage.DECODE)


def sign_raw(value: object) -> bytes:
    raw = msgspec.msgpack.encode(value, order="sorted")
    return wire.encode([raw, identity("alice").sign(BLOCK_TAG, cid(raw))])


def test_other_encodings_of_the_same_value() -> None:
    unsorted = msgspec.msgpack.encode(dict(sorted(RAW.items(), reverse=True)))
    sig = identity("alice").sign(BLOCK_TAG, cid(unsorted))
    refused(wire.encode([unsorted, sig]), Stage.DECODE, "canonical")
    good = MODEL.block.encode()
    refused(good + b"\0", Stage.DECODE)
    wide = good.replace(b"\xa1v\x01", b"\xa1v\xcc\x01")
    refused(wide, Stage.DECODE)
    refused(wire.encode([MODEL.block.raw, MODEL.block.sig + b"\0"]), Stage.DECODE, "65 bytes")
    refused(wire.encode([MODEL.block.raw]), Stage.DECODE)
    refused(wire.encode([MODEL.block.raw, MODEL.block.sig, b""]), Stage.DECODE)


def test_every_single_byte_counts() -> None:
    good = PART.block.encode()
    for at in range(len(good)):
        for flip in (0x01, 0x80, 0xFF):
            data = bytearray(good)
            data[at] ^= flip
            with pytest.raises(RemoteProtocolError):
                check(bytes(data))


def mutate(rng: random.Random, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at : at + 1] = rng.randbytes(1)
            case 3:
                data[at:at] = data[: rng.randint(0, 40)]
    return bytes(data)


def test_fuzz_headers() -> None:
    """10,000 blocks: mutated ones, noise, and well-signed noise; one type of error."""
    rng = random.Random(1)
    seeds = [m.block.encode() for m in (MODEL, PART, RELEASE)]
    for case in range(10_000):
        match case % 4:
            case 0:
                data = rng.randbytes(rng.randint(0, 300))
            case 1:
                raw = mutate(rng, MODEL.block.raw)
                data = wire.encode([raw, identity("alice").sign(BLOCK_TAG, cid(raw))])
            case _:
                data = mutate(rng, rng.choice(seeds))
        if data in seeds:
            continue
        try:
            block = check(data)
        except RemoteProtocolError as error:
            assert stage_of(error) is not None
        else:  # a mutation in a free field, signed: then it must be a block in every respect
            assert block.encode() == data and block.id not in (MODEL.id, PART.id, RELEASE.id)


def test_fuzz_manifests() -> None:
    rng = random.Random(2)
    seeds = [MODEL.manifest_bytes, PART.manifest_bytes, RELEASE.manifest_bytes]
    for case in range(10_000):
        data = mutate(rng, rng.choice(seeds)) if case % 4 else rng.randbytes(rng.randint(0, 200))
        try:
            manifest = Manifest.decode(data)
        except RemoteProtocolError:
            continue
        assert manifest.encode()[1] == data


def test_deep_nesting_is_an_error_and_not_a_crash() -> None:
    for byte in (b"\x91", b"\x81"):
        refused(byte * (limits.signed_header_bytes_max - 1), Stage.DECODE)
    with pytest.raises(RemoteProtocolError):
        Manifest.decode(b"\x91" * 100_000)


def test_kind_of_subject() -> None:
    assert kind_of(Subject("layer0.expert1")) is Kind.EXPERT
    assert kind_of(Subject("layer0.router")) is Kind.ROUTER
    for name in ("embed", "final", "head", "layer0.attention", "layer1.shared", "layer2.mlp"):
        assert kind_of(Subject(name)) is Kind.TRUNK
    assert is_staged(PART.block.header) and not is_staged(MODEL.block.header)
