"""Products with weights that are whole numbers of 8 bits, by their own rule in docs/sums.md.

A row becomes whole numbers of 16 bits times a power of two. Sums of whole numbers are exact, so
they have no order to keep, and one instruction makes and adds sixteen products where the others
make eight. A row that is not finite, or whose largest value is out of bounds, is left to the
products of `tile`, and so are depths that do not fit the stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import DOUBLE, FLOAT, I8, I16, I32, I64, POINTER, constant, vector
from blyan_node.moe.kernels.fields import field, rows_of
from blyan_node.moe.kernels.order import BLOCK
from blyan_node.moe.kernels.padding import padded
from blyan_node.moe.kernels.quantising import make_whole
from blyan_node.moe.kernels.storages import Storage
from blyan_node.moe.kernels.targets import Target
from blyan_node.moe.kernels.tile import ARGUMENTS, finish

LONGEST = 1 << 16  # values of a row
# Two products of 128 · 2^15 each, 128 times, are below 2^31.
_CHUNK = 128 * 16
# Rows and columns of a tile. Columns of a single row are one stream of weights after the other,
# which a processor foresees, and are finished together.
_SHAPES = ((4, 2), (1, 4))
_UNROLLED = 4  # blocks at a time, of one row


def product(module: ir.Module, storage: Storage, target: Target, apart: ir.Function) -> ir.Function:
    """`linear_STORAGE`: as `tile.product`; `apart` is that, for rows that cannot be made whole."""
    b, arguments = emit.define(module, f"linear_{storage.name}", ARGUMENTS)
    matrix, x, x_stride, rows, y, y_stride, first, last = arguments
    depth = field(b, matrix, "depth")
    with b.if_then(b.icmp_signed(">", depth, emit.word(LONGEST)), likely=False):
        b.call(apart, arguments)
        b.ret_void()
    quantise, most = make_whole(module), _SHAPES[0][0]
    numbers = emit.slot(b, ir.ArrayType(I16, most * (LONGEST + BLOCK)), align=32)
    powers, bad = emit.slot(b, ir.ArrayType(FLOAT, most)), emit.slot(b, I64)
    stride = b.shl(b.add(depth, emit.word(BLOCK)), emit.word(1))
    done = emit.slot(b, I64, emit.word(0))
    for height, width in _SHAPES:
        widths = sorted({width, 1}, reverse=True)
        tiles = [_tile(module, storage, target, (height, n)) for n in widths]
        with emit.steps(b, done, rows, height) as row:
            x_row, y_row = (
                emit.at(b, start, b.mul(row, step))
                for start, step in ((x, x_stride), (y, y_stride))
            )
            b.store(emit.word(0), bad)
            with emit.counting(b, emit.word(height)) as number:
                places = (numbers, stride), (powers, emit.word(4)), (x_row, x_stride)
                given = [emit.at(b, start, b.mul(number, step)) for start, step in places]
                b.call(quantise, [*given, depth, bad])
            all_whole = b.icmp_signed("==", b.load(bad, typ=I64), emit.word(0))
            with b.if_else(all_whole) as (then, otherwise):
                with then:
                    begin = first
                    for tile, step in zip(tiles, widths, strict=True):
                        fits = b.sdiv(b.sub(last, begin), emit.word(step))
                        end = b.add(begin, b.mul(fits, emit.word(step)))
                        b.call(tile, [matrix, numbers, stride, powers, y_row, y_stride, begin, end])
                        begin = end
                with otherwise, emit.counting(b, emit.word(height)) as number:
                    # A row in such company is computed as it is alone.
                    one = apart if height == 1 else b.function
                    x_one = emit.at(b, x_row, b.mul(number, x_stride))
                    y_one = emit.at(b, y_row, b.mul(number, y_stride))
                    b.call(
                        one, [matrix, x_one, x_stride, emit.word(1), y_one, y_stride, first, last]
                    )
    b.ret_void()
    return b.function


@dataclass(frozen=True)
class _Totals:
    """The exact sums of a tile, `slots[row][column]`, and each row's power of two."""

    slots: list[list[ir.Value]]
    powers: list[ir.Value]

    def totals(self, b: ir.IRBuilder, row: int, columns: Sequence[int]) -> ir.Value:
        """The sums of one row's pairs, at most four, rounded once."""
        lanes = [b.load(self.slots[row][column], typ=vector(I64, 4)) for column in columns]
        four = _four(b, [*lanes, *lanes[-1:] * (4 - len(lanes))])
        found = emit.pick(b, four, four, range(len(columns)))
        return b.fmul(found, emit.broadcast(b, self.powers[row], len(columns)))


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


def _tile(
    module: ir.Module, storage: Storage, target: Target, shape: tuple[int, int]
) -> ir.Function:
    """Columns `first` to `last` by tiles of `shape` (rows, columns), of rows made whole."""
    rows, columns = shape
    b, arguments = emit.define(
        module,
        f"tile_{storage.name}_{rows}x{columns}",
        (("matrix", POINTER), ("numbers", POINTER), ("stride", I64), ("powers", POINTER),
         ("y", POINTER), ("y_stride", I64), ("first", I64), ("last", I64)),
    )  # fmt: skip
    matrix, numbers, stride, powers, y, y_stride, first, last = arguments
    xs = [emit.at(b, numbers, b.mul(stride, emit.word(row))) for row in range(rows)]
    ys = [emit.at(b, y, b.mul(y_stride, emit.word(row))) for row in range(rows)]
    factors = [emit.load(b, FLOAT, powers, 4 * row) for row in range(rows)]
    with emit.counting(b, last, columns, first) as column:
        depth, weights = field(b, matrix, "depth"), rows_of(b, matrix, "weights", column, columns)
        streams = [[weight] for weight in weights] if rows == 1 else [weights]
        parts = [_sums(b, target, depth, xs, stream) for stream in streams]
        slots = [[slot for part in parts for slot in part[row]] for row in range(rows)]
        finish(b, storage, matrix, _Totals(slots, factors), ys, (column, columns))
    b.ret_void()
    return b.function


def _sums(
    b: ir.IRBuilder,
    target: Target,
    depth: ir.Value,
    xs: Sequence[ir.Value],
    weights: Sequence[ir.Value],
) -> list[list[ir.Value]]:
    """The exact sums of a tile's pairs, by row and column: registers of 64 bits."""
    rows, columns = len(xs), len(weights)
    wide = vector(I64, 4)
    slots = [[emit.slot(b, wide, constant(wide, 0)) for _ in weights] for _ in xs]
    whole = b.and_(depth, emit.word(-BLOCK))
    with emit.spans(b, emit.word(0), whole, _CHUNK) as (start, length):
        sums = _zeros(b, rows, columns)
        done = emit.slot(b, I64, emit.word(0))
        for step in (_UNROLLED * BLOCK, BLOCK) if rows == 1 else (BLOCK,):
            with emit.steps(b, done, length, step) as offset:
                for block in range(0, step, BLOCK):
                    k = b.add(start, b.add(offset, emit.word(block)))
                    _add_block(b, target, sums, xs, [emit.at(b, w, k) for w in weights], k)
        _add_up(b, sums, slots)
    left = b.sub(depth, whole)
    with b.if_then(b.icmp_signed(">", left, emit.word(0)), likely=False):
        sums = _zeros(b, rows, columns)
        ends = [padded(b, emit.at(b, w, whole), left, 1) for w in weights]
        _add_block(b, target, sums, xs, ends, whole)
        _add_up(b, sums, slots)
    return slots


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
                b.store(b.add(b.load(place, typ=kind), _products(b, target, values, w)), place)
        emit.keep_order(b)


def _products(b: ir.IRBuilder, target: Target, x: ir.Value, w: ir.Value) -> ir.Value:
    """x · w of int16 [16], every two of them added: int32 [8]."""
    if "avx2" in target.needs:
        return emit.intrinsic(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), [x, w])
    low, high = (
        emit.intrinsic(
            b,
            "llvm.x86.sse2.pmadd.wd",
            vector(I32, 4),
            [emit.pick(b, value, value, range(first, first + 8)) for value in (x, w)],
        )
        for first in (0, 8)
    )
    return emit.pick(b, low, high, range(8))


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
