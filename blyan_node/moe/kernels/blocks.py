"""The product of many rows: k is cut into blocks, and weights become float32 once for all rows.

A tile of `tile` walks all of k, and what many rows need of it does not fit the first-level cache.
Here a strip of columns is made float32 block by block. Every row passes over a block while it is
there, and the partial sums wait in memory for the next one. Between two blocks nothing is added up:
each partial sum has the operands and the order that it has in `tile`.

A register holds some of the sixteen partial sums of a pair. They do not meet before the end, so a
tile walks a block once for each register: it has only that one of every pair, and so more pairs.
"""

from collections.abc import Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit, fields, order, tile
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER
from blyan_node.moe.kernels.padding import pad
from blyan_node.moe.kernels.storages import Parts, Storage
from blyan_node.moe.kernels.targets import Target

_DEPTH = 384  # of a block
_COLUMNS = 12  # of a strip: its block takes 18 KiB
_ROWS = 64  # whose partial sums wait: 48 KiB
_PAIR_BYTES = 4 * order.PARTIAL_SUMS


def product(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`many_STORAGE`: as `tile.product`."""
    b, arguments = emit.define(module, f"many_{storage.name}", tile.ARGUMENTS)
    matrix, x, x_stride, rows, y, y_stride, first, last = arguments
    strip = _Strip(b, module, storage, target, matrix)
    depth = fields.field(b, matrix, "depth")
    whole = b.and_(depth, emit.word(-order.BLOCK))
    left, step = b.sub(depth, whole), _even(b, whole)
    tails = emit.slot(b, ir.ArrayType(FLOAT, _ROWS * order.BLOCK))
    tail_stride = emit.word(4 * order.BLOCK)
    with emit.spans(b, emit.word(0), rows, _ROWS) as (row, height):
        xs, ys = (emit.at(b, at, b.mul(row, s)) for at, s in ((x, x_stride), (y, y_stride)))
        with emit.counting(b, height) as one, b.if_then(b.icmp_signed("!=", left, emit.word(0))):
            x_left = emit.at(b, emit.at(b, xs, b.mul(one, x_stride)), b.shl(whole, emit.word(2)))
            pad(b, emit.at(b, tails, b.mul(one, tail_stride)), x_left, left, 4)
        with emit.spans(b, first, last, _COLUMNS) as (column, width):
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


def _even(b: ir.IRBuilder, whole: ir.Value) -> ir.Value:
    """The least depth with which `whole` takes no more blocks than with the greatest."""
    number = b.sdiv(b.add(whole, emit.word(_DEPTH - 1)), emit.word(_DEPTH))
    number = b.select(b.icmp_signed(">", number, emit.word(1)), number, emit.word(1))
    each = b.sdiv(b.add(whole, b.sub(number, emit.word(1))), number)
    return b.and_(b.add(each, emit.word(order.BLOCK - 1)), emit.word(-order.BLOCK))


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
        self._b, self._matrix = b, matrix
        self._weights = emit.slot(b, ir.ArrayType(FLOAT, _COLUMNS * _DEPTH))
        self._sums = emit.slot(b, ir.ArrayType(FLOAT, _ROWS * _COLUMNS * order.PARTIAL_SUMS))
        self._widen = _widen(module, storage, target)
        self._widen_tail = _widen_tail(module, storage, target) if storage.bits >= 8 else None
        self._add = _add(module, target)
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
        places = [x, x_stride, self._height, self._weights, self._width, *span, self._sums]
        self._b.call(self._add, places)

    def finish(self, y: ir.Value, y_stride: ir.Value) -> None:
        """Adds the partial sums up and writes the outputs."""
        places = [self._matrix, self._sums, self._height, y, y_stride, self._column, self._width]
        self._b.call(self._finish, places)


_WIDEN = (
    ("matrix", POINTER), ("column", I64), ("width", I64),
    ("k", I64), ("length", I64), ("weights", POINTER),
)  # fmt: skip


def _widen(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`widen_STORAGE`: float32 of `length` weights from `k` on, of each of `width` columns."""
    b, arguments = emit.define(module, f"widen_{storage.name}", _WIDEN)
    matrix, column, width, k, length, weights = arguments
    ahead = _ahead(b, storage, matrix, k, length)
    with emit.counting(b, width) as number:
        (start,) = fields.rows_of(b, matrix, "weights", b.add(column, number), 1)
        (scales,) = fields.scales_of(b, storage, matrix, b.add(column, number), 1)
        out = emit.at(b, weights, b.mul(number, emit.word(4 * _DEPTH)))
        with emit.counting(b, length, order.BLOCK) as offset:
            at = b.add(k, offset)
            block = emit.at(b, start, fields.length(b, storage, at))
            for line in range(0, storage.bytes(order.BLOCK), tile.LINE_BYTES):
                emit.prefetch(b, emit.at(b, emit.at(b, block, ahead), line))
            scale = storage.scale_at(b, scales, at)
            parts = storage.read(b, block, scale, target.lanes)
            _store_block(b, parts, target, emit.at(b, out, b.shl(offset, emit.word(2))))
    b.ret_void()
    return b.function


def _ahead(
    b: ir.IRBuilder, storage: Storage, matrix: ir.Value, k: ir.Value, length: ir.Value
) -> ir.Value:
    """From a block's weights to those of the next one, in bytes; at the end, of the next strip."""
    strip = b.mul(fields.field(b, matrix, "weights_stride"), emit.word(_COLUMNS))
    back, on = (fields.length(b, storage, weights) for weights in (k, length))
    ends = b.add(b.add(k, length), emit.word(order.BLOCK))
    last = b.icmp_signed(">", ends, fields.field(b, matrix, "depth"))
    return b.select(last, b.sub(strip, back), on)


def _widen_tail(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`widen_tail_STORAGE`: the same for the `length` < 32 weights in which columns end."""
    b, arguments = emit.define(module, f"widen_tail_{storage.name}", _WIDEN)
    matrix, column, width, k, length, weights = arguments
    block = emit.slot(b, ir.ArrayType(emit.I8, storage.bytes(order.BLOCK)))
    with emit.counting(b, width) as number:
        (start,) = fields.rows_of(b, matrix, "weights", b.add(column, number), 1)
        (scales,) = fields.scales_of(b, storage, matrix, b.add(column, number), 1)
        pad(b, block, emit.at(b, start, fields.length(b, storage, k)), length, storage.bytes(1))
        scale = storage.scale_at(b, scales, k)
        parts = storage.read(b, block, scale, target.lanes)
        _store_block(b, parts, target, emit.at(b, weights, b.mul(number, emit.word(4 * _DEPTH))))
    b.ret_void()
    return b.function


def _store_block(b: ir.IRBuilder, parts: Parts, target: Target, out: ir.Value) -> None:
    for part in range(order.BLOCK // target.lanes):
        emit.store(b, parts(part), out, 4 * target.lanes * part)


def _add(module: ir.Module, target: Target) -> ir.Function:
    """`add_block`: adds `length` products to each pair of rows of x with columns of weights."""
    if "add_block" in module.globals:
        return module.globals["add_block"]
    places = (
        ("x", POINTER), ("x_stride", I64), ("rows", I64),
        ("weights", POINTER), ("width", I64), ("k", I64), ("length", I64), ("sums", POINTER),
    )  # fmt: skip
    b, arguments = emit.define(module, "add_block", places)
    x, x_stride, rows, weights, width, k, length, sums = arguments
    most, columns = target.block
    done = emit.slot(b, I64, emit.word(0))
    # A tile that goes beyond the strip adds to sums that nobody takes.
    end = b.add(width, emit.word(columns - 1))
    for height in range(most, 0, -1):
        function = _tile(module, target, (height, columns))
        with emit.steps(b, done, rows, height) as row:
            x_row = emit.at(b, x, b.mul(row, x_stride))
            sums_row = emit.at(b, sums, b.mul(row, emit.word(_COLUMNS * _PAIR_BYTES)))
            with emit.counting(b, end, columns) as column:
                w = emit.at(b, weights, b.mul(column, emit.word(4 * _DEPTH)))
                here = emit.at(b, sums_row, b.mul(column, emit.word(_PAIR_BYTES)))
                b.call(function, [x_row, x_stride, w, k, length, here])
    b.ret_void()
    return b.function


def _tile(module: ir.Module, target: Target, shape: tuple[int, int]) -> ir.Function:
    """Adds a block's products to the pairs of `shape` (rows, columns), register by register."""
    rows, columns = shape
    places = (
        ("x", POINTER), ("x_stride", I64), ("weights", POINTER),
        ("k", I64), ("length", I64), ("sums", POINTER),
    )  # fmt: skip
    b, arguments = emit.define(module, f"block_tile_{rows}x{columns}", places)
    x, x_stride, weights, k, length, sums = arguments
    going_on = b.icmp_signed("!=", k, emit.word(0))
    kind, size = emit.vector(FLOAT, target.lanes), 4 * target.lanes
    xs = [emit.at(b, x, b.mul(x_stride, emit.word(row))) for row in range(rows)]
    pairs = [(row, column) for row in range(rows) for column in range(columns)]
    registers = order.PARTIAL_SUMS // target.lanes
    for register in range(registers):
        places_of = {
            (row, column): (row * _COLUMNS + column) * _PAIR_BYTES + register * size
            for row, column in pairs
        }
        zero = emit.constant(kind, 0.0)
        slots = {pair: emit.slot(b, kind, zero) for pair in pairs}
        with b.if_then(going_on):
            for pair, place in places_of.items():
                b.store(emit.load(b, kind, sums, place), slots[pair])
        with emit.counting(b, length, order.BLOCK) as done:
            offset = b.shl(done, emit.word(2))
            here, w_here = [emit.at(b, row, offset) for row in xs], emit.at(b, weights, offset)
            for part in range(register, order.BLOCK // target.lanes, registers):
                ws = [
                    emit.load(b, kind, w_here, 4 * _DEPTH * column + size * part)
                    for column in range(columns)
                ]
                for row in range(rows):
                    value = emit.load(b, kind, here[row], size * part)
                    for column in range(columns):
                        slot = slots[row, column]
                        b.store(emit.fma(b, value, ws[column], b.load(slot, typ=kind)), slot)
                emit.keep_order(b)
        for pair, place in places_of.items():
            emit.store(b, b.load(slots[pair], typ=kind), sums, place)
    b.ret_void()
    return b.function


class _Waiting:
    """The partial sums of a row's pairs in memory, for `tile.finish`."""

    def __init__(self, place: ir.Value, lanes: int) -> None:
        self._place, self._lanes = place, lanes

    def totals(self, b: ir.IRBuilder, row: int, columns: Sequence[int]) -> ir.Value:
        """The sums of the pairs with these columns."""
        kind = emit.vector(FLOAT, self._lanes)
        starts = range(0, _PAIR_BYTES, 4 * self._lanes)
        pairs = [
            [emit.load(b, kind, self._place, _PAIR_BYTES * column + start) for start in starts]
            for column in columns
        ]
        return order.total(b, [order.halve(b, pair) for pair in pairs])


def _finish(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`finish_STORAGE`: the outputs of `rows` rows and `width` columns from `column` on."""
    places = (
        ("matrix", POINTER), ("sums", POINTER), ("rows", I64), ("y", POINTER), ("y_stride", I64),
        ("column", I64), ("width", I64),
    )  # fmt: skip
    b, arguments = emit.define(module, f"finish_{storage.name}", places)
    matrix, sums, rows, y, y_stride, column, width = arguments
    with emit.counting(b, rows) as row:
        y_row = emit.at(b, y, b.mul(row, y_stride))
        sums_row = emit.at(b, sums, b.mul(row, emit.word(_COLUMNS * _PAIR_BYTES)))
        done = emit.slot(b, I64)
        b.store(emit.word(0), done)
        for count in (8, 1):
            with emit.steps(b, done, width, count) as number:
                waiting = _Waiting(
                    emit.at(b, sums_row, b.mul(number, emit.word(_PAIR_BYTES))), target.lanes
                )
                span = b.add(column, number), count
                tile.finish(b, storage, matrix, waiting, [y_row], span)
    b.ret_void()
    return b.function
