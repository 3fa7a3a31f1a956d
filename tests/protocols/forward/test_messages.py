"""Activation messages fit together or are refused with one error."""

import random
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.forward.messages import (
    MESSAGES,
    Activate,
    Activated,
    Busy,
    ExpertRows,
    Failed,
    NotHeld,
    check_activate,
    check_reply,
)
from protocols.ids import BlockId, cid


def block(n: int) -> BlockId:
    return BlockId(cid(b"expert %d" % n))


ASKED = Activate(
    request=bytes(16),
    model=block(99),
    layer=3,
    profile="cpu",
    rows=3,
    hidden=2,
    within_ms=1000,
    experts=(ExpertRows(block(0), (0, 2)), ExpertRows(block(1), (1,))),
    data=bytes(3 * 2 * 4),
)


def test_a_good_message_comes_back() -> None:
    again = MESSAGES.decode(MESSAGES.encode(ASKED))
    assert again == ASKED
    assert isinstance(again.experts[0], ExpertRows)
    check_activate(again)
    assert again.rows_out == 3


@dataclass(frozen=True)
class Case:
    fields: dict[str, object]
    why: str


@pytest.mark.parametrize(
    "case",
    [
        Case({"request": b"short"}, "request id"),
        Case({"layer": -1}, "layer"),
        Case({"layer": limits.layers_max}, "layer"),
        Case({"profile": "x" * 65}, "profile"),
        Case({"rows": 0}, "0 rows"),
        Case({"rows": limits.activation_rows_max + 1}, "rows"),
        Case({"hidden": 0}, "rows of 0"),
        Case({"hidden": 1 << 40}, "rows of"),
        Case({"within_ms": 0}, "deadline"),
        Case({"data": b""}, "do not fit"),
        Case({"experts": ()}, "0 experts"),
        Case({"experts": (ExpertRows(block(0), ()),)}, "without rows"),
        Case({"experts": (ExpertRows(BlockId(b"x"), (0,)),)}, "block id"),
        Case({"experts": (ExpertRows(block(0), (3,)),)}, "out of range"),
        Case({"experts": (ExpertRows(block(0), (-1,)),)}, "out of range"),
        Case({"experts": (ExpertRows(block(0), (0,)),) * 2}, "twice"),
        Case({"experts": (ExpertRows(block(0), (0,) * 500_000),)}, "too large"),
    ],
)
def test_parts_that_do_not_fit_are_refused(case: Case) -> None:
    message = msgspec.structs.replace(ASKED, **case.fields)
    with pytest.raises(RemoteProtocolError, match=case.why):
        check_activate(message)


def test_replies_must_fit_what_was_asked() -> None:
    check_reply(Activated(bytes(3 * 2 * 4)), ASKED)
    check_reply(Busy(3), ASKED)
    check_reply(Failed("no"), ASKED)
    check_reply(NotHeld((block(1),)), ASKED)
    for bad in (
        Activated(bytes(3 * 2 * 4 - 1)),
        Activated(bytes(4 * 2 * 4)),
        NotHeld(()),
        NotHeld((block(2),)),
    ):
        with pytest.raises(RemoteProtocolError, match="asked for"):
            check_reply(bad, ASKED)


def test_ten_thousand_broken_frames_are_one_kind_of_error() -> None:
    rng = random.Random(1)
    good = [MESSAGES.encode(m) for m in (ASKED, Activated(bytes(24)), NotHeld((block(1),)))]
    for _ in range(10_000):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            data = data[: rng.randrange(len(data))]
        if rng.random() < 0.1:
            data = bytearray(rng.randbytes(rng.randrange(100)))
        try:
            message = MESSAGES.decode(bytes(data))
            if isinstance(message, Activate):
                check_activate(message)
            else:
                check_reply(message, ASKED)
        except RemoteProtocolError:
            continue


@given(st.binary(max_size=300))
def test_random_bytes_are_refused_or_decode_to_what_encodes(data: bytes) -> None:
    try:
        message = MESSAGES.decode(data)
    except RemoteProtocolError:
        return
    assert MESSAGES.decode(MESSAGES.encode(message)) == message
