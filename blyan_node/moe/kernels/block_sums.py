"""The partial sums of a strip's pairs, to which a block's products are added (`blocks`).

A register holds some of the sixteen partial sums of a pair. They do not meet before the end, so a
tile walks a block once for each register: it has only that one of every pair, and so more pairs.
Between two blocks the sums wait in memory; behind the last one a tile adds them up.
"""

from collections.abc import Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit, order
from blyan_node.moe.kernels.block_weights import COLUMNS, DEPTH
from blyan_node.moe.kernels.emit import FLOAT, I1, I64, POINTER
from blyan_node.moe.kernels.targets import Target

_PAIR_BYTES = 4 * order.PARTIAL_SUMS
SUMS_BYTES = COLUMNS * _PAIR_BYTES  # of a row
TOTALS_BYTES = 4 * COLUMNS  # of a row
_LINE_BYTES = 64
_LINES = 4 * order.BLOCK // _LINE_BYTES  # of a block of 32 of a row of x

# What is added to: the sums, which begin in the first block and are added up in the last one.
_SUMS = (("begins", I1), ("ends", I1), ("sums", POINTER), ("totals", POINTER))


def add(module: ir.Module, target: Target) -> ir.Function:
    """`add_block`: adds `length` products to each pair of rows of x with columns of weights.

    Meanwhile it asks for what the next block is made of: `coming_bytes` of each column.
    """
    if "add_block" in module.globals:
        return module.globals["add_block"]
    places = (
        ("x", POINTER), ("x_stride", I64), ("rows", I64),
        ("weights", POINTER), ("width", I64), ("length", I64), *_SUMS,
        ("coming", POINTER), ("coming_stride", I64), ("coming_bytes", I64),
    )  # fmt: skip
    b, arguments = emit.define(module, "add_block", places)
    x, x_stride, rows, weights, width, length, begins, ends, sums, totals, *coming = arguments
    most, columns = target.block
    done, asked = (emit.slot(b, I64, emit.word(0)) for _ in range(2))
    # A tile that goes beyond the strip adds to sums that nobody takes.
    end = b.add(width, emit.word(columns - 1))
    for height in range(most, 0, -1):
        function = _tile(module, target, (height, columns))
        with emit.steps(b, done, rows, height) as row:
            _ask(b, coming, asked, b.udiv(b.mul(b.add(row, emit.word(height)), width), rows))
            x_row = emit.at(b, x, b.mul(row, x_stride))
            sums_row = emit.at(b, sums, b.mul(row, emit.word(SUMS_BYTES)))
            totals_row = emit.at(b, totals, b.mul(row, emit.word(TOTALS_BYTES)))
            ahead = emit.slot(b, POINTER, emit.at(b, x_row, b.mul(x_stride, emit.word(height))))
            with emit.counting(b, end, columns) as column:
                w = emit.at(b, weights, b.mul(column, emit.word(4 * DEPTH)))
                here = emit.at(b, sums_row, b.mul(column, emit.word(_PAIR_BYTES)))
                total = emit.at(b, totals_row, b.shl(column, emit.word(2)))
                x_next = b.load(ahead, typ=POINTER)
                b.call(function, [x_row, x_stride, w, length, begins, ends, here, total, x_next])
                b.store(emit.at(b, x_next, x_stride), ahead)
    b.ret_void()
    return b.function


def _ask(b: ir.IRBuilder, coming: list[ir.Value], asked: ir.Value, last: ir.Value) -> None:
    """Asks for the columns before `last` that were not asked for."""
    first, stride, size = coming
    with emit.steps(b, asked, last, 1) as column:
        start = emit.at(b, first, b.mul(column, stride))
        with emit.counting(b, b.add(size, emit.word(_LINE_BYTES - 1)), _LINE_BYTES) as line:
            emit.prefetch(b, emit.at(b, start, line))


def _tile(module: ir.Module, target: Target, shape: tuple[int, int]) -> ir.Function:
    """Adds a block's products to the pairs of `shape` (rows, columns), register by register.

    Meanwhile it asks for as much of a row of x at `ahead`.
    """
    places = (
        ("x", POINTER), ("x_stride", I64), ("weights", POINTER), ("length", I64), *_SUMS,
        ("ahead", POINTER),
    )  # fmt: skip
    rows, columns = shape
    b, arguments = emit.define(module, f"block_tile_{rows}x{columns}", places)
    x, x_stride, weights, length, begins, ends, sums, totals, ahead = arguments
    size = b.shl(length, emit.word(2))
    xs = [emit.at(b, x, b.add(size, b.mul(x_stride, emit.word(row)))) for row in range(rows)]
    weights, ahead = (emit.at(b, place, size) for place in (weights, ahead))
    pairs = _Pairs(b, target, shape, sums)
    for register in range(pairs.registers):
        pairs.zero()
        with b.if_then(b.not_(begins)):
            pairs.load(register)
        with emit.approaching(b, size, 4 * order.BLOCK) as offset:
            for line in range(
                register * _LINE_BYTES, 4 * order.BLOCK, pairs.registers * _LINE_BYTES
            ):
                emit.prefetch(b, emit.at(b, emit.at(b, ahead, offset), line), 1)
            here = [emit.at(b, row, offset) for row in xs]
            pairs.add(register, here, emit.at(b, weights, offset))
        if register < pairs.registers - 1:
            pairs.store(register)
    with b.if_else(ends) as (at_the_end, before):
        with at_the_end:
            for row in range(rows):
                emit.store(b, pairs.totals(row), totals, row * TOTALS_BYTES)
        with before:
            pairs.store(pairs.registers - 1)
    b.ret_void()
    return b.function


class _Pairs:
    """One register of each pair of a tile; all sums of a pair wait in memory at `sums`."""

    def __init__(
        self, b: ir.IRBuilder, target: Target, shape: tuple[int, int], sums: ir.Value
    ) -> None:
        self._b, self._lanes, self._sums = b, target.lanes, sums
        self._rows, self._columns = shape
        self._kind, self._bytes = emit.vector(FLOAT, target.lanes), 4 * target.lanes
        self.registers = order.PARTIAL_SUMS // target.lanes
        pairs = [(row, column) for row in range(shape[0]) for column in range(shape[1])]
        self._slots = {pair: emit.slot(b, self._kind) for pair in pairs}

    def zero(self) -> None:
        """The sums begin."""
        for slot in self._slots.values():
            self._b.store(emit.constant(self._kind, 0.0), slot)

    def _waiting(self, pair: tuple[int, int], register: int) -> ir.Value:
        row, column = pair
        offset = row * SUMS_BYTES + column * _PAIR_BYTES + register * self._bytes
        return emit.at(self._b, self._sums, offset)

    def load(self, register: int) -> None:
        """Takes the sums of that number up."""
        for pair, slot in self._slots.items():
            self._b.store(emit.load(self._b, self._kind, self._waiting(pair, register)), slot)

    def store(self, register: int) -> None:
        """Lets them wait."""
        for pair, slot in self._slots.items():
            emit.store(self._b, self._b.load(slot, typ=self._kind), self._waiting(pair, register))

    def add(self, register: int, xs: Sequence[ir.Value], weights: ir.Value) -> None:
        """Adds those of 32 products that are added to this register."""
        b, size = self._b, self._bytes
        for part in range(register * size, 4 * order.BLOCK, self.registers * size):
            values = [emit.load(b, self._kind, x, part) for x in xs]
            for column in range(self._columns):
                w = emit.load(b, self._kind, weights, 4 * DEPTH * column + part)
                for row, value in enumerate(values):
                    slot = self._slots[row, column]
                    b.store(emit.fma(b, value, w, b.load(slot, typ=self._kind)), slot)
            # Left to itself LLVM loads for the next part first and runs out of registers.
            emit.keep_order(b)

    def totals(self, row: int) -> ir.Value:
        """The sums of a row's pairs, of which the last register is here."""
        b, kind, columns, halves = self._b, self._kind, range(self._columns), []
        for pair in ((row, column) for column in columns):
            before = range(self.registers - 1)
            registers = [emit.load(b, kind, self._waiting(pair, number)) for number in before]
            halves.append(order.halve(b, [*registers, b.load(self._slots[pair], typ=kind)]))
        while len(halves).bit_count() > 1:  # `order.total` takes 1, 2, 4 …
            halves.append(halves[-1])
        total = order.total(b, halves)
        return emit.pick(b, total, total, columns)
