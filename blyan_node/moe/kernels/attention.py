"""Attention of one token over the positions that it sees, for some of its key-value heads.

Scores are products with the keys (`linear_float32`), then a softmax; an output is the dot product
of the shares with one dimension of the values. All of them are sums in the order of docs/sums.md.
"""

from llvmlite import ir

from blyan_node.moe.kernels import emit, order, tile
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER, constant, vector
from blyan_node.moe.kernels.epilogues import elements, softmax, store
from blyan_node.moe.kernels.targets import Target

# The fields of a task in memory, each of 8 bytes; strides in bytes. `scale` is an address, and so
# is `sinks`, or 0. `scores` is room for `group` rows of `seen + 1` float32 for each kv head.
FIELDS = (
    "query", "query_stride", "out", "out_stride", "keys", "keys_head_stride", "keys_stride",
    "values", "values_head_stride", "values_stride", "scores", "scale", "sinks",
    "group", "seen", "dim", "value_dim",
)  # fmt: skip
_ADDRESSES = {"query", "out", "keys", "values", "scores", "scale", "sinks"}

ARGUMENTS = (("task", POINTER), ("first", I64), ("last", I64))


def attention(module: ir.Module, target: Target) -> ir.Function:
    """`attend`: kv heads `first` to `last` of a task."""
    mix = _mix(module, target)
    b, (task, first, last) = emit.define(module, "attend", ARGUMENTS)
    f = {
        name: emit.load(b, POINTER if name in _ADDRESSES else I64, task, 8 * number)
        for number, name in enumerate(FIELDS)
    }
    matrix = emit.slot(b, ir.ArrayType(I64, len(tile.FIELDS)))
    nothing = emit.slot(b, FLOAT, constant(FLOAT, -0.0))
    scores_stride = b.shl(b.add(f["seen"], emit.word(1)), emit.word(2))
    with emit.counting(b, last, 1, first) as head:
        leader = b.mul(head, f["group"])  # the first query head of this kv head
        scores = emit.at(b, f["scores"], b.mul(leader, scores_stride))
        keys = emit.at(b, f["keys"], b.mul(head, f["keys_head_stride"]))
        values = emit.at(b, f["values"], b.mul(head, f["values_head_stride"]))
        _fill(b, matrix, {"weights": keys, "weights_stride": f["keys_stride"],
                          "scales": f["scale"], "biases": nothing, "depth": f["dim"]})  # fmt: skip
        query = emit.at(b, f["query"], b.mul(leader, f["query_stride"]))
        b.call(
            module.globals["linear_float32"],
            [matrix, query, f["query_stride"], f["group"], scores, scores_stride,
             emit.word(0), f["seen"]],
        )  # fmt: skip
        count = _add_sinks(b, f, leader, scores, scores_stride)
        places = [scores, scores_stride, scores, scores_stride]
        b.call(softmax(module, target), [*places, f["group"], count])
        with emit.counting(b, f["group"]) as member:
            out = emit.at(b, f["out"], b.mul(b.add(leader, member), f["out_stride"]))
            shares = emit.at(b, scores, b.mul(member, scores_stride))
            b.call(mix, [out, shares, values, f["values_stride"], f["seen"], f["value_dim"]])
    b.ret_void()
    return b.function


def _fill(b: ir.IRBuilder, matrix: ir.Value, fields: dict[str, ir.Value]) -> None:
    """Writes a matrix's fields; those that are not named are 0."""
    for number, name in enumerate(tile.FIELDS):
        emit.store(b, fields.get(name, emit.word(0)), matrix, 8 * number)


def _add_sinks(
    b: ir.IRBuilder,
    f: dict[str, ir.Value],
    leader: ir.Value,
    scores: ir.Value,
    scores_stride: ir.Value,
) -> ir.Value:
    """Puts each head's sink after its scores, if there are any; how many values a row has then."""
    count = emit.slot(b, I64, f["seen"])
    some = b.icmp_unsigned("!=", b.ptrtoint(f["sinks"], I64), emit.word(0))
    with b.if_then(some):
        b.store(b.add(f["seen"], emit.word(1)), count)
        last = b.shl(f["seen"], emit.word(2))
        with emit.counting(b, f["group"]) as member:
            sink = emit.load(b, FLOAT, f["sinks"], b.shl(b.add(leader, member), emit.word(2)))
            emit.store(b, sink, scores, b.add(b.mul(member, scores_stride), last))
    return b.load(count, typ=I64)


def _mix(module: ir.Module, target: Target) -> ir.Function:
    """`mix`: out[d] is the dot product of the shares [seen] with values[:, d]."""
    arguments = (
        ("out", POINTER), ("shares", POINTER), ("values", POINTER), ("stride", I64),
        ("seen", I64), ("dim", I64),
    )  # fmt: skip
    b, (out, shares, values, stride, seen, dim) = emit.define(module, "mix", arguments)
    up = b.add(seen, emit.word(order.BLOCK - 1))
    padded_seen = b.and_(up, emit.word(-order.BLOCK))

    def body(width: int, index: ir.Value) -> None:
        kind = vector(FLOAT, width)
        column = emit.at(b, values, b.shl(index, emit.word(2)))
        sums: list[ir.Value] = []
        # Eight partial sums at a time, so that they stay in registers.
        for lanes in (range(8), range(8, 16)):
            slots = [emit.slot(b, kind, constant(kind, 0.0)) for _ in lanes]
            done = emit.slot(b, I64, emit.word(0))
            for last, tail in ((seen, False), (padded_seen, True)):
                with emit.steps(b, done, last, order.PARTIAL_SUMS) as start:
                    for lane, place in zip(lanes, slots, strict=True):
                        position = b.add(start, emit.word(lane))
                        real = b.icmp_signed("<", position, seen)
                        if tail:
                            position = b.select(real, position, emit.word(0))
                        share = emit.load(b, FLOAT, shares, b.shl(position, emit.word(2)))
                        value = emit.load(b, kind, column, b.mul(position, stride))
                        if tail:
                            share = b.select(real, share, constant(FLOAT, 0.0))
                            value = b.select(real, value, constant(kind, 0.0))
                        share = emit.broadcast(b, share, width)
                        b.store(emit.fma(b, share, value, b.load(place, typ=kind)), place)
            sums += [b.load(place, typ=kind) for place in slots]
        store(b, order.halve(b, sums), out, index)

    elements(b, dim, target.lanes, body)
    b.ret_void()
    return b.function
