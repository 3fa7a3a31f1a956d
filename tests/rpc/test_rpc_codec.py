"""JSON-RPC lines: what is read, what is refused, and that nothing else can happen."""

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import limits
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.rpc import codec
from protocols.rpc.codec import Call, Invalid, Lines, Note, Reply
from protocols.rpc.generate import GenerateRequest, Token
from protocols.rpc.model import ShowRequest


def _line(**fields: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", **fields}).encode()


def _one(line: bytes) -> Call | Invalid:
    parsed = codec.parse(line)
    assert len(parsed.calls) == 1 and not parsed.batch
    return parsed.calls[0]


def test_a_request_is_taken_apart() -> None:
    call = _one(_line(id=7, method="model.show", params={"model": "tiny"}))
    assert isinstance(call, Call)
    assert (call.id, call.method, call.wants_reply) == (7, "model.show", True)
    assert call.request(ShowRequest) == ShowRequest(model="tiny")


def test_a_request_without_an_id_wants_no_reply() -> None:
    call = _one(_line(method="node.status"))
    assert isinstance(call, Call)
    assert not call.wants_reply


def test_parameters_may_be_left_out() -> None:
    call = _one(_line(id="a", method="node.status"))
    assert isinstance(call, Call)
    assert call.params == b"{}"


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"nonsense",
        b'{"jsonrpc":"2.0","id":1,"method":"a"} trailing',
        b'{"a":1}{"b":2}',
        b"\xff\xfe",
        b"[" * (limits.rpc_depth_max + 1),
        b'{"a":' * 100_000,
        b"[" + b"1," * limits.rpc_batch_max + b"1]",
        b'"' + b"x" * limits.rpc_line_bytes_max + b'"',
        b'"' + b'\\"' * 1_000_000 + b"\\",  # quadratic for a careless scanner
        b"[]" * 1_000_000,
    ],
)
def test_what_is_no_json_or_over_a_limit_is_a_remote_error(line: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="rpc"):
        codec.parse(line)


@pytest.mark.parametrize(
    ("line", "why", "request_id"),
    [
        (b"1", "object", None),
        (_line(id=1), "method", 1),
        (b'{"id":3,"method":"a"}', "jsonrpc", 3),
        (_line(id=[1], method="a"), "id", None),
        (_line(id=1.5, method="a"), "id", None),
        (_line(id=4, method="a", params=[1, 2]), "named", 4),
        (_line(id=5, method="a", extra=1), "extra", 5),
        (b"[]", "empty", None),
    ],
)
def test_what_is_json_but_no_request_is_invalid(line: bytes, why: str, request_id: object) -> None:
    call = _one(line)
    assert isinstance(call, Invalid)
    assert why in call.why
    assert call.id == request_id
    assert call.refusal().code is ErrorCode.INVALID_REQUEST


def test_a_batch_keeps_its_order_and_its_bad_parts() -> None:
    parsed = codec.parse(b"[%s,1,%s]" % (_line(id=1, method="a"), _line(id=2, method="b")))
    assert parsed.batch
    first, second, third = parsed.calls
    assert isinstance(first, Call) and isinstance(third, Call) and isinstance(second, Invalid)
    assert (first.method, third.method) == ("a", "b")


def test_depth_counts_brackets_and_not_those_inside_strings() -> None:
    deep = "[" * 20 + "]" * 20
    quoted = _line(id=1, method="a", params={"x": '[{\\"' * 500, "y": deep})
    assert isinstance(_one(quoted), Call)


def test_json_that_is_nested_too_deep_is_refused_before_it_is_parsed() -> None:
    fits, too_deep = limits.rpc_depth_max - 1, limits.rpc_depth_max
    assert codec.parse(_line(id=1, method="a", params={"x": _nested(fits - 1)}))
    with pytest.raises(RemoteProtocolError, match="nested deeper"):
        codec.parse(_line(id=1, method="a", params={"x": _nested(too_deep)}))


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_a_wrong_parameter_is_named() -> None:
    call = Call(1, "generate.run", b'{"model":"tiny","prompt_ids":[1,-2]}')
    with pytest.raises(Refused, match=r"prompt_ids\[") as caught:
        call.request(GenerateRequest)
    assert caught.value.code is ErrorCode.INVALID_PARAMS


@pytest.mark.parametrize(
    ("params", "why"),
    [
        (b'{"model":"tiny"}', "exactly one"),
        (b'{"model":"tiny","prompt":"a","prompt_ids":[1]}', "exactly one"),
        (b'{"model":"tiny","prompt_ids":[1],"chat":true}', "needs a `prompt`"),
        (b'{"model":"tiny","prompt":"a","max_tokens":0}', "max_tokens"),
        (b'{"model":"tiny","prompt":"a","temperature":-1}', "temperature"),
        (b'{"model":"tiny","prompt":"a","top_q":1}', "top_q"),
        (b'{"model":"tiny","prompt":"a","top_k":-1}', "top_k"),
        (b'{"model":"tiny","prompt":"a","min_p":1.1}', "min_p"),
        (b'{"model":"tiny","prompt":"a","repetition_penalty":0}', "repetition_penalty"),
        (b'{"model":"tiny","prompt":"a","stop":[""]}', "stop"),
        (b'{"model":"tiny","prompt":"a","stop":"x"}', "stop"),
        (b'{"model":"tiny","prompt":"a","messages":[]}', "messages"),
        (b'{"model":"tiny","messages":[]}', "messages"),
        (b'{"model":"tiny","messages":[{"role":"user"}]}', "content"),
        (b'{"model":"tiny","messages":[{"role":"god","content":"a"}]}', "role"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"a","name":"b"}]}', "name"),
        (b'{"prompt":"a"}', "model"),
    ],
)
def test_generate_checks_its_parameters(params: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        Call(1, "generate.run", params).request(GenerateRequest)


def test_an_error_survives_the_wire() -> None:
    refused = Refused(ErrorCode.STALE_BASE, "not updated", "it moved", "try again", {"head": "b"})
    reply = codec.parse_reply(codec.error(3, refused))
    assert isinstance(reply, Reply)
    assert reply.id == 3
    assert reply.refused == refused


def test_an_error_object_says_what_why_and_what_next() -> None:
    refused = Refused(ErrorCode.NOT_FOUND, "no such model", "nowhere", "publish it", {"model": "x"})
    assert codec.error_object(refused) == {
        "code": 1,
        "message": "no such model: nowhere",
        "data": {"model": "x", "why": "nowhere", "next": "publish it"},
    }


def test_a_notification_carries_the_id_of_its_request() -> None:
    note = codec.parse_reply(codec.notification("generate.token", 9, Token(token_id=4, text="a")))
    assert note == Note("generate.token", {"id": 9, "token_id": 4, "text": "a", "reasoning": None})


def test_a_code_of_a_newer_node_is_still_an_error() -> None:
    line = b'{"jsonrpc":"2.0","id":1,"error":{"code":999,"message":"new"}}'
    reply = codec.parse_reply(line)
    assert isinstance(reply, Reply) and reply.refused is not None
    assert reply.refused.what == "new"


def test_lines_are_cut_wherever_the_bytes_are_cut() -> None:
    data = b'{"a":1}\n\n  \n{"b":2}\r\n{"c"'
    for at in range(len(data)):
        lines = Lines()
        assert lines.feed(data[:at]) + lines.feed(data[at:]) == [b'{"a":1}', b'{"b":2}']
        assert lines.partial


def test_a_line_that_never_ends_is_refused_at_the_limit() -> None:
    lines = Lines(bytes_max=100)
    lines.feed(b"x" * 100)
    with pytest.raises(RemoteProtocolError, match="longer than 100"):
        lines.feed(b"x")


def test_a_whole_line_over_the_limit_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="longer than 100"):
        Lines(bytes_max=100).feed(b"x" * 101 + b"\n")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=20,
)


@given(json_values)
def test_any_json_is_calls_or_one_error(value: Any) -> None:
    _read(json.dumps(value).encode())


def test_10_000_broken_lines_are_calls_or_one_error() -> None:
    rng = random.Random(5)
    good = [
        _line(id=1, method="generate.run", params={"model": "tiny", "prompt": 'Ünïcode \\ " '}),
        _line(id="x", method="rpc.cancel", params={"id": 1}),
        b"[%s,%s]" % (_line(id=1, method="a"), _line(method="b", params={"c": [1.5, None, {}]})),
    ]
    for _ in range(10_000):
        line = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            _break(line, rng)
        _read(bytes(line))


def _break(line: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(line) + 1)
    match rng.randrange(4):
        case 0:
            line[at:at] = rng.randbytes(rng.randint(1, 8))
        case 1:
            del line[at : at + rng.randint(1, 20)]
        case 2:
            line[at : at + 1] = bytes([rng.choice(b'{}[],:"\\0e-\n')])
        case _:
            line[at:at] = line[: rng.randint(0, len(line))]


def _read(line: bytes) -> None:
    try:
        parsed = codec.parse(line)
    except RemoteProtocolError:
        return
    for call in parsed.calls:
        if isinstance(call, Call):
            try:
                call.request(GenerateRequest)
            except Refused as refused:
                assert refused.code is ErrorCode.INVALID_PARAMS
        else:
            assert call.refusal().code is ErrorCode.INVALID_REQUEST


def test_10_000_broken_replies_are_messages_or_one_error() -> None:
    rng = random.Random(6)
    good = [
        codec.result(1, {"a": [1, 2], "b": None}),
        codec.error(1, Refused(ErrorCode.BUSY, "a", "b", "c", {"d": 1})),
        codec.notification("generate.token", 1, Token(token_id=1, text="x")),
    ]
    for _ in range(10_000):
        line = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            _break(line, rng)
        try:
            message = codec.parse_reply(bytes(line))
        except RemoteProtocolError:
            continue
        assert isinstance(message, Note | Reply)
