"""The rule of int8: rows have one power of two, and sums are exact.

Exact sums have no order to keep. They are of 32 bits for as long as they fit, and of 64 then.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import DOUBLE, FLOAT, I8, I16, I32, I64, constant, vector
from blyan_node.moe.kernels.fields import field, rows_of
from blyan_node.moe.kernels.integers import products
from blyan_node.moe.kernels.order import BLOCK
from blyan_node.moe.kernels.padding import padded
from blyan_node.moe.kernels.quantising import make_whole
from blyan_node.moe.kernels.targets import Target
from blyan_node.moe.kernels.tile import LINE_BYTES
from blyan_node.moe.kernels.whole import LONGEST, Rows, Rule

# Two products of 128 · 2^15 each, 128 times, are below 2^31.
_CHUNK = 128 * 16
_UNROLLED = 4  # blocks at a time, of one row
# Of one row's columns, short ones end before a processor foresees the next: they are asked for.
_SHORT, _AHEAD = 1024, 12 * 1024


@dataclass(frozen=True)
class _Totals:
    """The exact sums of a tile, `slots[row][column]`, and each row's power of two."""

    slots: list[list[ir.Value]]
    rows: Rows

    def totals(self, b: ir.IRBuilder, row: int, columns: Sequence[int]) -> ir.Value:
        """The sums of one row's pairs, at most four, rounded once."""
        lanes = [b.load(self.slots[row][column], typ=vector(I64, 4)) for column in columns]
        four = _four(b, [*lanes, *lanes[-1:] * (4 - len(lanes))])
        found = emit.pick(b, four, four, range(len(columns)))
        power = emit.load(b, FLOAT, self.rows.powers[row])
        return b.fmul(found, emit.broadcast(b, power, len(columns)))


def _four(b: ir.IRBuilder, sums: Sequence[ir.Value]) -> ir.Value:
    """The sum of the lanes of each of four registers, rounded: float32 [4].

    Below 2^51 a whole number is exact as the end of a float64's mantissa.
    """

    def add(one: ir.Value, other: ir.Value, low: Sequence[int], high: Sequence[int]) -> ir.Value:
        return b.add(emit.pick(b, one, other, low), emit.pick(b, one, other, high))

    first, last = (add(sums[n], sums[n + 1], (0, 4, 2, 6), (1, 5, 3, 7)) for n in (0, 2))
    total = add(first, last, (0, 1, 4, 5), (2, 3, 6, 7))
    start = constant(vector(DOUBLE, 4), 1.5 * 2.0**52)
    moved = b.bitcast(b.add(total, b.bitcast(start, total.type)), start.type)
    return b.fptrunc(b.fsub(moved, start), vector(FLOAT, 4))


def _add(
    b: ir.IRBuilder, target: Target, matrix: ir.Value, rows: Rows, columns: Sequence[ir.Value]
) -> _Totals:
    """The exact sums of a tile's pairs."""
    depth, wide = field(b, matrix, "depth"), vector(I64, 4)
    weights = [rows_of(b, matrix, "weights", column, 1)[0] for column in columns]
    slots = [[emit.slot(b, wide, constant(wide, 0)) for _ in weights] for _ in rows.numbers]
    if len(slots) == 1:
        for weight, slot in zip(weights, slots[0], strict=True):
            _add_columns(b, target, depth, rows.numbers, [weight], [[slot]])
    else:
        _add_columns(b, target, depth, rows.numbers, weights, slots)
    return _Totals(slots, rows)


def _add_columns(
    b: ir.IRBuilder,
    target: Target,
    depth: ir.Value,
    xs: Sequence[ir.Value],
    weights: Sequence[ir.Value],
    slots: Sequence[Sequence[ir.Value]],
) -> None:
    """Adds the products of rows and columns to `slots`, by row and column."""
    whole = b.and_(depth, emit.word(-BLOCK))
    short = b.icmp_signed("<=", depth, emit.word(_SHORT))
    with emit.spans(b, emit.word(0), whole, _CHUNK) as (start, length):
        sums = _zeros(b, len(xs), len(weights))
        done = emit.slot(b, I64, emit.word(0))
        for step in (_UNROLLED * BLOCK, BLOCK) if len(xs) == 1 else (BLOCK,):
            with emit.steps(b, done, length, step) as offset:
                if len(xs) == 1:
                    with b.if_then(short):
                        _ask(b, emit.at(b, weights[0], b.add(start, offset)), step)
                for block in range(0, step, BLOCK):
                    k = b.add(start, b.add(offset, emit.word(block)))
                    _add_block(b, target, sums, xs, [emit.at(b, w, k) for w in weights], k)
        _add_up(b, sums, slots)
    left = b.sub(depth, whole)
    with b.if_then(b.icmp_signed(">", left, emit.word(0)), likely=False):
        sums = _zeros(b, len(xs), len(weights))
        ends = [padded(b, emit.at(b, w, whole), left, 1) for w in weights]
        _add_block(b, target, sums, xs, ends, whole)
        _add_up(b, sums, slots)


def _ask(b: ir.IRBuilder, place: ir.Value, size: int) -> None:
    """Asks for what lies ahead of the `size` weights there."""
    for line in range(0, size, LINE_BYTES):
        emit.prefetch(b, emit.at(b, place, _AHEAD + line))


def _zeros(b: ir.IRBuilder, rows: int, columns: int) -> list[list[tuple[ir.Value, ...]]]:
    """Sums of 32 bits, two registers for a pair of a single row."""
    kind = vector(I32, 8)
    count = 2 if rows == 1 else 1
    return [
        [tuple(emit.slot(b, kind, constant(kind, 0)) for _ in range(count)) for _ in range(columns)]
        for _ in range(rows)
    ]


def _add_block(
    b: ir.IRBuilder,
    target: Target,
    sums: Sequence[Sequence[Sequence[ir.Value]]],
    xs: Sequence[ir.Value],
    weights: Sequence[ir.Value],
    k: ir.Value,
) -> None:
    """Adds 32 products to each pair: of the weights at those addresses and the rows from k on."""
    kind, sixteen = vector(I32, 8), vector(I16, 16)
    for part in range(0, BLOCK, 16):
        ws = [b.sext(emit.load(b, vector(I8, 16), weight, part), sixteen) for weight in weights]
        at = b.shl(b.add(k, emit.word(part)), emit.word(1))
        for row, x in zip(sums, xs, strict=True):
            values = emit.load(b, sixteen, x, at)
            for places, w in zip(row, ws, strict=True):
                place = places[part // 16 % len(places)]
                b.store(b.add(b.load(place, typ=kind), products(b, target, values, w)), place)
        emit.keep_order(b)


def _add_up(
    b: ir.IRBuilder,
    sums: Sequence[Sequence[Sequence[ir.Value]]],
    slots: Sequence[Sequence[ir.Value]],
) -> None:
    """Adds sums of 32 bits to those of 64."""
    narrow, wide = vector(I32, 8), vector(I64, 4)
    for row, pairs in zip(sums, slots, strict=True):
        for places, slot in zip(row, pairs, strict=True):
            lanes, *more = (b.load(place, typ=narrow) for place in places)
            for others in more:  # of the same chunk
                lanes = b.add(lanes, others)
            halves = (emit.pick(b, lanes, lanes, range(n, n + 4)) for n in (0, 4))
            low, high = (b.sext(half, wide) for half in halves)
            b.store(b.add(b.load(slot, typ=wide), b.add(low, high)), slot)


RULE = Rule(make_whole, LONGEST, ((4, 2), (1, 4)), _add)
