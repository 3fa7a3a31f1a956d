"""The product of many rows: k is cut into blocks, and weights become float32 once for all rows.

A tile of `tile` walks all of k, and what many rows need of it does not fit the first-level cache.
Here a strip of columns is made float32 block by block. Every row passes over a block while it is
there, and the partial sums wait in memory for the next one. Between two blocks nothing is added up:
each partial sum has the operands and the order that it has in `tile`.
"""

from llvmlite import ir

from blyan_node.moe.kernels import block_sums, block_weights, emit, fields, order, outputs, tile
from blyan_node.moe.kernels.block_sums import SUMS_BYTES, TOTALS_BYTES
from blyan_node.moe.kernels.block_weights import COLUMNS, DEPTH
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER
from blyan_node.moe.kernels.padding import pad
from blyan_node.moe.kernels.storages import Storage
from blyan_node.moe.kernels.targets import Target

_ROWS = 192  # whose partial sums wait: 144 KiB
_ROWS_STEP = 12  # whole tiles, of three rows or of four
_ALIGNED = 64  # so that no register is loaded from two cache lines


def product(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`many_STORAGE`: as `tile.product`."""
    b, arguments = emit.define(module, f"many_{storage.name}", tile.ARGUMENTS)
    matrix, x, x_stride, rows, y, y_stride, first, last = arguments
    strip = _Strip(b, module, storage, target, matrix)
    depth = fields.field(b, matrix, "depth")
    whole = b.and_(depth, emit.word(-order.BLOCK))
    left, step = b.sub(depth, whole), _even(b, whole, DEPTH, order.BLOCK)
    tails = emit.slot(b, ir.ArrayType(FLOAT, _ROWS * order.BLOCK))
    tail_stride = emit.word(4 * order.BLOCK)
    with emit.spans(b, emit.word(0), rows, _even(b, rows, _ROWS, _ROWS_STEP)) as (row, height):
        xs, ys = (emit.at(b, at, b.mul(row, s)) for at, s in ((x, x_stride), (y, y_stride)))
        with emit.counting(b, height) as one, b.if_then(b.icmp_signed("!=", left, emit.word(0))):
            x_left = emit.at(b, emit.at(b, xs, b.mul(one, x_stride)), b.shl(whole, emit.word(2)))
            pad(b, emit.at(b, tails, b.mul(one, tail_stride)), x_left, left, 4)
        with emit.spans(b, first, last, COLUMNS) as (column, width):
            strip.begin(column, width, height)
            with emit.spans(b, emit.word(0), whole, step) as (k, length):
                strip.widen(k, length)
                strip.add(emit.at(b, xs, b.shl(k, emit.word(2))), x_stride, (k, length))
            if storage.bits >= 8:
                with b.if_then(b.icmp_signed("!=", left, emit.word(0))):
                    strip.widen_tail(whole, left)
                    strip.add(tails, tail_stride, (whole, emit.word(order.BLOCK)))
            strip.finish(ys, y_stride)
    b.ret_void()
    return b.function


def _even(b: ir.IRBuilder, count: ir.Value, most: int, multiple: int) -> ir.Value:
    """The least multiple with which `count` takes no more spans than with `most`, which is one."""
    number = b.sdiv(b.add(count, emit.word(most - 1)), emit.word(most))
    number = b.select(b.icmp_signed(">", number, emit.word(1)), number, emit.word(1))
    each = b.sdiv(b.add(count, b.sub(number, emit.word(1))), number)
    return b.and_(b.add(each, emit.word(multiple - 1)), emit.word(-multiple))


class _Strip:
    """What is done with one strip of columns: calls of functions that do it, and their memory."""

    def __init__(
        self,
        b: ir.IRBuilder,
        module: ir.Module,
        storage: Storage,
        target: Target,
        matrix: ir.Value,
    ) -> None:
        self._b, self._storage, self._matrix = b, storage, matrix

        def room(floats: int) -> ir.Value:
            return emit.slot(b, ir.ArrayType(FLOAT, floats), align=_ALIGNED)

        self._weights = room(COLUMNS * DEPTH)
        self._sums = room(_ROWS * SUMS_BYTES // 4)
        self._totals = room(_ROWS * TOTALS_BYTES // 4)
        self._widen = block_weights.widen(module, storage, target)
        self._widen_tail = (
            block_weights.widen_tail(module, storage, target) if storage.bits >= 8 else None
        )
        self._add = block_sums.add(module, target)
        self._finish = _finish(module, storage, target)

    def begin(self, column: ir.Value, width: ir.Value, height: ir.Value) -> None:
        """Takes the columns from `column` on, for so many rows."""
        self._column, self._width, self._height = column, width, height

    def widen(self, k: ir.Value, length: ir.Value) -> None:
        """Makes float32 of the block's weights."""
        places = [self._matrix, self._column, self._width, k, length, self._weights]
        self._b.call(self._widen, places)

    def widen_tail(self, k: ir.Value, left: ir.Value) -> None:
        """Makes float32 of the last weights of each column, and zeros to a whole block of 32."""
        assert self._widen_tail is not None
        places = [self._matrix, self._column, self._width, k, left, self._weights]
        self._b.call(self._widen_tail, places)

    def add(self, x: ir.Value, x_stride: ir.Value, span: tuple[ir.Value, ir.Value]) -> None:
        """Adds the products of the block to the partial sums of every pair.

        The block begins at the first of `span` and has so many weights; sums begin with k = 0.
        """
        b, matrix, storage, (k, length) = self._b, self._matrix, self._storage, span
        begins = b.icmp_signed("==", k, emit.word(0))
        depth, stride = (fields.field(b, matrix, name) for name in ("depth", "weights_stride"))
        ends = b.icmp_signed(">=", b.add(k, length), depth)
        (start,) = fields.rows_of(b, matrix, "weights", self._column, 1)
        on = block_weights.ahead(b, storage, matrix, k, length)
        coming = emit.at(b, start, b.add(fields.length(b, storage, k), on))
        b.call(
            self._add,
            [x, x_stride, self._height, self._weights, self._width, length,
             begins, ends, self._sums, self._totals,
             coming, stride, fields.length(b, storage, length)],
        )  # fmt: skip

    def finish(self, y: ir.Value, y_stride: ir.Value) -> None:
        """Writes the outputs."""
        places = [self._matrix, self._totals, self._height, y, y_stride, self._column, self._width]
        self._b.call(self._finish, places)


def _finish(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`finish_STORAGE`: the outputs of `rows` rows and `width` columns from `column` on."""
    places = (
        ("matrix", POINTER), ("totals", POINTER), ("rows", I64), ("y", POINTER), ("y_stride", I64),
        ("column", I64), ("width", I64),
    )  # fmt: skip
    b, arguments = emit.define(module, f"finish_{storage.name}", places)
    matrix, totals, rows, y, y_stride, column, width = arguments
    done = emit.slot(b, I64, emit.word(0))
    for count in (COLUMNS, 4, 1):
        with emit.steps(b, done, width, count) as number:
            here, kind = b.add(column, number), emit.vector(FLOAT, count)
            given = outputs.factors(b, matrix, here, count)
            mine, ys = (
                emit.at(b, p, b.shl(n, emit.word(2))) for p, n in ((totals, number), (y, here))
            )
            with emit.counting(b, rows) as row:
                sums = emit.load(b, kind, mine, b.mul(row, emit.word(TOTALS_BYTES)))
                value = outputs.output(b, storage, sums, given)
                emit.store(b, value, ys, b.mul(row, y_stride))
    b.ret_void()
    return b.function
