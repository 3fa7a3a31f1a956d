"""Products with rows that are made whole numbers of 16 bits, by their own rules in docs/sums.md.

One instruction makes and adds sixteen products of whole numbers where others make eight. A row that
cannot be made whole is left to the products of `tile`, and so are depths that do not fit the stack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I16, I64, POINTER
from blyan_node.moe.kernels.fields import field
from blyan_node.moe.kernels.order import BLOCK
from blyan_node.moe.kernels.outputs import Sums, finish
from blyan_node.moe.kernels.storages import Storage
from blyan_node.moe.kernels.targets import Target
from blyan_node.moe.kernels.tile import ARGUMENTS, LINE_BYTES

LONGEST = 1 << 16  # values of a row


@dataclass(frozen=True)
class Rows:
    """The addresses of some rows' whole numbers, and of the powers of two that they are times."""

    numbers: Sequence[ir.Value]
    powers: Sequence[ir.Value]


@dataclass(frozen=True)
class Rule:
    """How rows are made whole, and how their products with weights are added.

    `prepare` describes the function that makes one row whole (`quantising`), with a power of two
    for every `numbers` of them. `shapes` are rows and columns of a tile, with one row the last.
    `add` emits the sums of rows with columns. Columns of a single row are one stream of weights
    after the other, which a processor foresees, and are finished together.
    """

    prepare: Callable[[ir.Module], ir.Function]
    numbers: int
    shapes: Sequence[tuple[int, int]]
    add: Callable[[ir.IRBuilder, Target, ir.Value, Rows, Sequence[ir.Value]], Sums]

    @property
    def power_stride(self) -> int:
        """From the powers of a row to the next one's: not in the same lines of a cache."""
        return 4 * LONGEST // self.numbers + LINE_BYTES


def product(
    module: ir.Module, storage: Storage, target: Target, rule: Rule, apart: ir.Function
) -> ir.Function:
    """`linear_STORAGE`: as `tile.product`; `apart` is that, for rows that cannot be made whole."""
    b, arguments = emit.define(module, f"linear_{storage.name}", ARGUMENTS)
    matrix, x, x_stride, rows, y, y_stride, first, last = arguments
    depth = field(b, matrix, "depth")
    with b.if_then(b.icmp_signed(">", depth, emit.word(LONGEST)), likely=False):
        b.call(apart, arguments)
        b.ret_void()
    prepare, (most, _) = rule.prepare(module), rule.shapes[0]
    numbers = emit.slot(b, ir.ArrayType(I16, most * (LONGEST + BLOCK)), align=32)
    powers = emit.slot(b, ir.ArrayType(FLOAT, most * rule.power_stride // 4))
    stride = b.shl(b.add(depth, emit.word(BLOCK)), emit.word(1))
    power_stride = emit.word(rule.power_stride)
    bad, done = emit.slot(b, I64), emit.slot(b, I64, emit.word(0))
    for height, width in rule.shapes:
        widths = sorted({width, 1}, reverse=True)
        tiles = [_tile(module, storage, target, rule, (height, n)) for n in widths]
        with emit.steps(b, done, rows, height) as row:
            x_row, y_row = (
                emit.at(b, start, b.mul(row, step))
                for start, step in ((x, x_stride), (y, y_stride))
            )
            b.store(emit.word(0), bad)
            with emit.counting(b, emit.word(height)) as number:
                places = (numbers, stride), (powers, power_stride), (x_row, x_stride)
                given = [emit.at(b, start, b.mul(number, step)) for start, step in places]
                b.call(prepare, [*given, depth, bad])
            all_whole = b.icmp_signed("==", b.load(bad, typ=I64), emit.word(0))
            with b.if_else(all_whole) as (then, otherwise):
                with then:
                    begin, prepared = first, [numbers, stride, powers, power_stride]
                    for tile, step in zip(tiles, widths, strict=True):
                        fits = b.sdiv(b.sub(last, begin), emit.word(step))
                        end = b.add(begin, b.mul(fits, emit.word(step)))
                        b.call(tile, [matrix, *prepared, y_row, y_stride, begin, end])
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


def _tile(
    module: ir.Module, storage: Storage, target: Target, rule: Rule, shape: tuple[int, int]
) -> ir.Function:
    """Columns `first` to `last` by tiles of `shape` (rows, columns), of rows made whole."""
    rows, columns = shape
    b, arguments = emit.define(
        module,
        f"tile_{storage.name}_{rows}x{columns}",
        (("matrix", POINTER), ("numbers", POINTER), ("stride", I64), ("powers", POINTER),
         ("power_stride", I64), ("y", POINTER), ("y_stride", I64), ("first", I64), ("last", I64)),
    )  # fmt: skip
    matrix, numbers, stride, powers, power_stride, y, y_stride, first, last = arguments
    each, power_of, ys = (
        [emit.at(b, start, b.mul(step, emit.word(row))) for row in range(rows)]
        for start, step in ((numbers, stride), (powers, power_stride), (y, y_stride))
    )
    prepared = Rows(each, power_of)
    with emit.counting(b, last, columns, first) as column:
        here = [b.add(column, emit.word(n)) for n in range(columns)]
        sums = rule.add(b, target, matrix, prepared, here)
        finish(b, storage, matrix, sums, ys, (column, columns))
    b.ret_void()
    return b.function
