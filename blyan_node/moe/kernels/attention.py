"""Attention of the last rows of a sequence over the positions that each of them sees.

Scores are products with the keys (`linear_float32`), then a softmax; an output is the dot product
of the shares with one dimension of the values (`columns_float32`). All of them are sums in the
order of docs/sums.md.
"""

from llvmlite import ir

from blyan_node.moe.kernels import emit, fields
from blyan_node.moe.kernels.columns import columns
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER, constant
from blyan_node.moe.kernels.epilogues import softmax
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import Target

# The fields of a task in memory, each of 8 bytes; strides in bytes. Row r of `rows` sees the
# positions before `seen - rows + r + 1`, the last `window` of them. `group` query heads share the
# keys and values of one kv head; they are computed in `parts` parts, a whole number of heads each.
# `scale` is an address, and so is `sinks`, or 0. `scores` has room for `seen + 1` float32 for each
# query head.
FIELDS = (
    "query", "query_row_stride", "query_stride", "out", "out_row_stride", "out_stride",
    "keys", "keys_head_stride", "keys_stride", "values", "values_head_stride", "values_stride",
    "scores", "scale", "sinks",
    "group", "parts", "rows", "seen", "window", "dim", "value_dim",
)  # fmt: skip
_ADDRESSES = {"query", "out", "keys", "values", "scores", "scale", "sinks"}

ARGUMENTS = (("task", POINTER), ("first", I64), ("last", I64))


def attention(module: ir.Module, target: Target) -> ir.Function:
    """`attend`: parts `first` to `last` of a task; kv head h has h * parts and those after it."""
    values_by_columns = columns(module, STORAGES["float32"], target)
    b, (task, first, last) = emit.define(module, "attend", ARGUMENTS)
    f = {
        name: emit.load(b, POINTER if name in _ADDRESSES else I64, task, 8 * number)
        for number, name in enumerate(FIELDS)
    }
    matrix = emit.slot(b, ir.ArrayType(I64, len(fields.FIELDS)))
    nothing = emit.slot(b, FLOAT, constant(FLOAT, -0.0))
    scores_stride = b.shl(b.add(f["seen"], emit.word(1)), emit.word(2))
    members = b.udiv(f["group"], f["parts"])
    before = b.sub(f["seen"], f["rows"])
    with emit.counting(b, last, 1, first) as part, emit.counting(b, f["rows"]) as row:
        head = b.udiv(part, f["parts"])
        leader = b.mul(part, members)  # the first query head
        end = b.add(b.add(before, row), emit.word(1))
        windowed = b.icmp_signed("<", f["window"], end)
        seen = b.select(windowed, f["window"], end)
        start = b.sub(end, seen)

        def place(name: str, of_head: ir.Value = head, at: ir.Value = start) -> ir.Value:
            offset = b.add(b.mul(of_head, f[f"{name}_head_stride"]), b.mul(at, f[f"{name}_stride"]))
            return emit.at(b, f[name], offset)

        def row_of(name: str, of_row: ir.Value = row, at: ir.Value = leader) -> ir.Value:
            offset = b.add(b.mul(of_row, f[f"{name}_row_stride"]), b.mul(at, f[f"{name}_stride"]))
            return emit.at(b, f[name], offset)

        scores = emit.at(b, f["scores"], b.mul(leader, scores_stride))
        _fill(b, matrix, {"weights": place("keys"), "weights_stride": f["keys_stride"],
                          "scales": f["scale"], "biases": nothing, "depth": f["dim"]})  # fmt: skip
        b.call(
            module.globals["linear_float32"],
            [matrix, row_of("query"), f["query_stride"], members, scores, scores_stride,
             emit.word(0), seen],
        )  # fmt: skip
        count = _add_sinks(b, f["sinks"], (leader, members), (scores, scores_stride), seen)
        places = [scores, scores_stride, scores, scores_stride]
        b.call(softmax(module, target), [*places, members, count])
        _fill(b, matrix, {"weights": place("values"), "weights_stride": f["values_stride"],
                          "biases": nothing, "depth": seen})  # fmt: skip
        b.call(
            values_by_columns,
            [matrix, scores, scores_stride, members, row_of("out"), f["out_stride"],
             emit.word(0), f["value_dim"]],
        )  # fmt: skip
    b.ret_void()
    return b.function


def _fill(b: ir.IRBuilder, matrix: ir.Value, given: dict[str, ir.Value]) -> None:
    """Writes a matrix's fields; those that are not given are 0."""
    for number, name in enumerate(fields.FIELDS):
        emit.store(b, given.get(name, emit.word(0)), matrix, 8 * number)


def _add_sinks(
    b: ir.IRBuilder,
    sinks: ir.Value,
    heads: tuple[ir.Value, ir.Value],
    scores: tuple[ir.Value, ir.Value],
    seen: ir.Value,
) -> ir.Value:
    """Puts each head's sink after its scores, if there are any; how many values a row has then.

    `heads` are the first and how many, `scores` the address of a row and the stride to the next.
    """
    (leader, members), (first, stride) = heads, scores
    count = emit.slot(b, I64, seen)
    some = b.icmp_unsigned("!=", b.ptrtoint(sinks, I64), emit.word(0))
    with b.if_then(some):
        b.store(b.add(seen, emit.word(1)), count)
        last = b.shl(seen, emit.word(2))
        with emit.counting(b, members) as member:
            sink = emit.load(b, FLOAT, sinks, b.shl(b.add(leader, member), emit.word(2)))
            emit.store(b, sink, first, b.add(b.mul(member, stride), last))
    return b.load(count, typ=I64)
