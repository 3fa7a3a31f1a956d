"""Framing of requests and replies: scripts, properties, and 10,000 cases of garbage."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.channel.answerer import Answerer, Asked, Cancelled
from protocols.channel.asker import Answered, Asker, RefusedByPeer
from protocols.channel.frames import HEADER, PIECE_BYTES, FrameKind
from protocols.errors import ErrorCode, LocalProtocolError, Refused, RemoteProtocolError
from protocols.limits import (
    channel_request_bytes_max,
    frame_bytes_max,
    in_flight_requests_max,
    incomplete_messages_max,
    message_bytes_max,
)


def frame(kind: int, request: int, total: int, piece: bytes) -> bytes:
    return HEADER.pack(kind, request, total, len(piece)) + piece


def drain(side: Asker | Answerer) -> bytes:
    return b"".join(iter(side.take, b""))


def test_a_request_and_its_reply() -> None:
    asker, answerer = Asker(), Answerer()
    first = asker.ask(b"how many?")
    assert list(answerer.receive(drain(asker))) == [Asked(first, b"how many?")]
    answerer.reply(first, b"three")
    assert list(asker.receive(drain(answerer))) == [Answered(first, b"three")]
    assert asker.in_flight == 0 and not asker and not answerer


def test_a_refusal_says_all_that_refused_says() -> None:
    asker, answerer = Asker(), Answerer()
    data = {"queue": 256, "id": b"x", "l": [1]}
    busy = Refused(ErrorCode.BUSY, "busy", "256 wait", "ask another", data)
    for refused in (busy, Refused(ErrorCode.CORRUPT, "w" * 5000, "", "", {"no": set, "b": 1})):
        asker.ask(b"?")
        (asked,) = answerer.receive(drain(asker))
        answerer.refuse(asked.request, refused)
        (told,) = asker.receive(drain(answerer))
        assert isinstance(told, RefusedByPeer)
        assert told.refused.code == refused.code and told.refused.why == refused.why
        assert told.refused.what == refused.what[:1000]
        assert told.refused.data == (refused.data if refused is busy else {})


def test_a_small_message_does_not_wait_for_a_large_one() -> None:
    asker, answerer = Asker(), Answerer()
    large = [asker.ask(bytes(message_bytes_max)) for _ in range(3)]
    arrived = list(answerer.receive(asker.take()))
    assert arrived == []
    small = asker.ask(b"small")
    assert list(answerer.receive(asker.take())) == [Asked(small, b"small")]
    assert [asked.request for asked in answerer.receive(drain(asker))] == large


def test_large_messages_take_turns_and_few_are_incomplete() -> None:
    asker = Asker()
    for _ in range(6):
        asker.ask(bytes(4 * PIECE_BYTES))
    sent, order = drain(asker), []
    while sent:
        _, request, _, length = HEADER.unpack_from(sent)
        order.append(request)
        sent = sent[HEADER.size + length :]
    assert order[:8] == [1, 2, 3, 4, 1, 2, 3, 4]
    begun: set[int] = set()
    for i, request in enumerate(order):
        begun.add(request)
        incomplete = {r for r in begun if r in order[i + 1 :]}
        assert len(incomplete) <= incomplete_messages_max


def test_cancelling() -> None:
    asker, answerer = Asker(), Answerer()
    unsent = asker.ask(b"unsent")
    asker.cancel(unsent)
    assert asker.in_flight == 0 and drain(asker) == b""

    running = asker.ask(b"running")
    list(answerer.receive(drain(asker)))
    asker.cancel(running)
    assert list(answerer.receive(drain(asker))) == [Cancelled(running)]
    assert drain(answerer) == b"" and asker.in_flight == 1  # until the work on it has ended
    answerer.reply(running, b"too late")
    assert list(asker.receive(drain(answerer))) == [] and asker.in_flight == 0

    crossing = asker.ask(b"crossing")
    list(answerer.receive(drain(asker)))
    answerer.reply(crossing, b"r")
    asker.cancel(crossing)
    assert list(asker.receive(drain(answerer))) == []
    assert list(answerer.receive(drain(asker))) == [] and drain(answerer) == b""

    half = asker.ask(bytes(message_bytes_max))
    list(answerer.receive(asker.take()))
    asker.cancel(half)
    assert list(answerer.receive(drain(asker))) == []
    assert list(asker.receive(drain(answerer))) == [] and asker.in_flight == 0
    assert answerer._assembler._incomplete == {} and answerer._sizes == {}


def test_what_may_be_in_flight_is_bounded_on_both_sides() -> None:
    asker = Asker()
    for _ in range(in_flight_requests_max):
        asker.ask(b"x")
    assert not asker.may_ask(1)
    with pytest.raises(LocalProtocolError, match="in flight"):
        asker.ask(b"x")
    list((answerer := Answerer()).receive(drain(asker)))
    with pytest.raises(RemoteProtocolError, match="requests in flight"):
        list(answerer.receive(frame(FrameKind.REQUEST, 1000, 1, b"x")))

    asker, answerer = Asker(), Answerer()
    for _ in range(channel_request_bytes_max // message_bytes_max):
        asker.ask(bytes(message_bytes_max))
    assert not asker.may_ask(1)
    list(answerer.receive(drain(asker)))
    with pytest.raises(RemoteProtocolError, match="bytes in flight"):
        list(answerer.receive(frame(FrameKind.REQUEST, 1000, 1, b"x")))


def test_cancelling_does_not_make_room_for_more_work() -> None:
    answerer = Answerer()
    for request in range(1, in_flight_requests_max + 1):
        sent = frame(FrameKind.REQUEST, request, 1, b"x") + frame(FrameKind.CANCEL, request, 0, b"")
        assert list(answerer.receive(sent)) == [Asked(request, b"x"), Cancelled(request)]
    with pytest.raises(RemoteProtocolError, match="requests in flight"):
        list(answerer.receive(frame(FrameKind.REQUEST, 1000, 1, b"x")))


def test_a_request_is_in_flight_until_its_reply_has_left() -> None:
    answerer = Answerer()
    for request in range(1, in_flight_requests_max + 1):
        list(answerer.receive(frame(FrameKind.REQUEST, request, 1, b"x")))
        answerer.reply(request, bytes(100))
    assert answerer.unsent_bytes == 100 * in_flight_requests_max
    with pytest.raises(RemoteProtocolError, match="requests in flight"):
        list(answerer.receive(frame(FrameKind.REQUEST, 1000, 1, b"x")))

    answerer = Answerer()
    list(answerer.receive(frame(FrameKind.REQUEST, 1, 1, b"x")))
    answerer.reply(1, bytes(message_bytes_max))
    while answerer.unsent_bytes:
        with pytest.raises(RemoteProtocolError, match="twice"):
            list(answerer.receive(frame(FrameKind.REQUEST, 1, 1, b"x")))
        answerer.take()
    list(answerer.receive(frame(FrameKind.REQUEST, 1, 1, b"x")))


def test_a_request_is_no_longer_than_the_protocols_longest_message() -> None:
    answerer = Answerer(request_bytes_max=10)
    assert list(answerer.receive(frame(FrameKind.REQUEST, 1, 10, bytes(10))))
    with pytest.raises(RemoteProtocolError, match="of 11 bytes, at most 10"):
        list(answerer.receive(frame(FrameKind.REQUEST, 2, 11, b"x")))


REQUEST, CANCEL, REPLY, REFUSAL = FrameKind


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (frame(REPLY, 1, 1, b"x"), "frame kind 3"),
        (frame(9, 1, 1, b"x"), "frame kind 9"),
        (frame(REQUEST, 0, 1, b"x"), "id 0"),
        (frame(REQUEST, 1, 0, b""), "of 0 bytes"),
        (HEADER.pack(REQUEST, 1, message_bytes_max + 1, 1), "at most"),
        (HEADER.pack(REQUEST, 1, message_bytes_max, frame_bytes_max + 1), "a piece of"),
        (frame(REQUEST, 1, 2, b""), "a piece of 0"),
        (frame(REQUEST, 1, 1, b"xx"), "a piece of 2"),
        (frame(CANCEL, 1, 1, b"x"), "CANCEL with content"),
        (frame(REQUEST, 1, 1, b"x") * 2, "twice"),
        (frame(REQUEST, 1, 3, b"x") + frame(REQUEST, 1, 4, b"x"), "do not fit"),
        (frame(REQUEST, 1, 3, b"xx") * 2, "longer than"),
        (b"".join(frame(REQUEST, i, 2, b"x") for i in range(1, 6)), "begun at once"),
    ],
)
def test_each_malformed_request_has_its_reason(sent: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        list(Answerer().receive(sent))


def test_a_reply_that_nobody_asked_for() -> None:
    with pytest.raises(RemoteProtocolError, match="not asked"):
        list(Asker().receive(frame(REPLY, 1, 1, b"x")))
    asker = Asker()
    asker.ask(b"x")
    with pytest.raises(RemoteProtocolError, match="refusal"):
        list(asker.receive(frame(REFUSAL, 1, 4, b"junk")))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 17, 1000, PIECE_BYTES, 200_000]), max_size=12),
    seed=st.integers(0, 2**32),
)
def test_any_conversation_however_cut_gives_each_request_its_reply(
    sizes: list[int], seed: int
) -> None:
    chance = random.Random(seed)
    asker, answerer = Asker(), Answerer()
    wanted = {asker.ask(chance.randbytes(size)): size for size in sizes}
    cancelled = {request for request in wanted if chance.random() < 0.2}
    open_requests: list[Asked] = []
    answers: dict[int, int] = {}
    pending = sorted(cancelled)
    while asker.in_flight:
        if pending and chance.random() < 0.5:
            asker.cancel(pending.pop())
        for part in cut(asker.take(), chance):
            for event in answerer.receive(part):
                if isinstance(event, Asked):
                    open_requests.append(event)
        chance.shuffle(open_requests)
        while open_requests and chance.random() < 0.7:
            asked = open_requests.pop()
            answerer.reply(asked.request, asked.data)
        for part in cut(answerer.take(), chance):
            for answer in asker.receive(part):
                assert isinstance(answer, Answered) and answer.request not in answers
                answers[answer.request] = len(answer.data)
    assert {r: s for r, s in wanted.items() if r not in cancelled}.items() <= answers.items()
    assert answers.items() <= wanted.items()


def cut(data: bytes, chance: random.Random) -> list[bytes]:
    edges = sorted(chance.randrange(len(data) + 1) for _ in range(3))
    return [data[a:b] for a, b in pairwise([0, *edges, len(data)])]


def test_10_000_cases_of_garbage_give_one_error() -> None:
    chance = random.Random(3)
    errors = 0
    for case in range(10_000):
        asker, answerer = Asker(), Answerer()
        asker.ask(b"a question")
        asker.ask(bytes(100_000))
        answerer_input = bytearray(asker.take())
        list(Answerer().receive(bytes(answerer_input)))
        sides: tuple[Asker | Answerer, ...] = (asker, answerer)
        if case % 3 == 0:
            data = chance.randbytes(chance.randrange(200))
        elif case % 3 == 1:
            kind = chance.randrange(6)
            data = frame(kind, chance.randrange(4), chance.randrange(9), chance.randbytes(4)) * 3
        else:
            for _ in range(3):
                answerer_input[chance.randrange(40)] = chance.randrange(256)
            data = bytes(answerer_input)
        for side in sides:
            try:
                list(side.receive(data))
            except RemoteProtocolError:
                errors += 1
    assert errors > 5_000
