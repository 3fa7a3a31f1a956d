"""The product of a row with a matrix that is stored by columns: [depth, outs] in memory.

Such a matrix is walked as it lies. The partial sums of a strip of outputs wait in the first-level
cache; every few rows of weights are added to them, each to the partial sums of its own k. So they
have the operands and the order of docs/sums.md, and are added up in the same tree.
"""

from llvmlite import ir

from blyan_node.moe.kernels import emit, fields, order, tile
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER, constant, vector
from blyan_node.moe.kernels.epilogues import elements, load, store
from blyan_node.moe.kernels.storages import Storage
from blyan_node.moe.kernels.targets import Target

# What the partial sums of a strip take is a third of the smallest cache of a core.
_STRIP = 192
_ROWS_AT_ONCE = 4  # of the same partial sum


def columns(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`columns_STORAGE`: as `tile.product`, for a matrix whose `weights_stride` is from k to k + 1.

    There is no scale, and biases have a stride of 4, or 0 if there are none.
    """
    name = f"columns_{storage.name}"
    found = module.globals.get(name)
    if found is not None:
        return found
    strip = _strip(module, storage, target)
    b, arguments = emit.define(module, name, tile.ARGUMENTS)
    matrix, x, x_stride, rows, y, y_stride, first, last = arguments
    end = b.add(last, emit.word(_STRIP - 1))
    with emit.counting(b, end, _STRIP, first) as start:
        left = b.sub(last, start)
        whole = b.icmp_signed("<", emit.word(_STRIP), left)
        width = b.select(whole, emit.word(_STRIP), left)
        with emit.counting(b, rows) as row:
            x_row, y_row = emit.at(b, x, b.mul(row, x_stride)), emit.at(b, y, b.mul(row, y_stride))
            b.call(strip, [matrix, x_row, y_row, start, width])
    b.ret_void()
    return b.function


def _strip(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """The outputs from `start` on, `width` of them, of one row."""
    places = (("matrix", POINTER), ("x", POINTER), ("y", POINTER), ("start", I64), ("width", I64))
    b, (matrix, x, y, start, width) = emit.define(module, f"strip_{storage.name}", places)
    sums = emit.slot(b, ir.ArrayType(FLOAT, order.PARTIAL_SUMS * _STRIP))
    stride, depth = (fields.field(b, matrix, name) for name in ("weights_stride", "depth"))
    weights = fields.field(b, matrix, "weights")
    weights = emit.at(b, weights, b.mul(start, emit.word(storage.bytes(1))))

    def of_lane(lane: ir.Value) -> ir.Value:
        return emit.at(b, sums, b.mul(lane, emit.word(4 * _STRIP)))

    def zero(lane: ir.Value) -> None:
        def body(size: int, index: ir.Value) -> None:
            kind = vector(FLOAT, size)
            emit.store(b, constant(kind, 0.0), place, b.shl(index, emit.word(2)))

        place = of_lane(lane)
        elements(b, width, target.lanes, body)

    def pad(lane: ir.Value) -> None:
        """Adds 0 · 0, which makes 0 of -0."""

        def body(size: int, index: ir.Value) -> None:
            value = load(b, size, place, index)
            padded = b.fadd(value, constant(value.type, 0.0))
            emit.store(b, padded, place, b.shl(index, emit.word(2)))

        place = of_lane(lane)
        elements(b, width, target.lanes, body)

    def add(k: ir.Value, lane: ir.Value, count: int) -> None:
        """Adds the products of k, k + 16, … to their partial sum."""
        ks = [b.add(k, emit.word(order.PARTIAL_SUMS * number)) for number in range(count)]
        values = [emit.load(b, FLOAT, x, b.shl(one, emit.word(2))) for one in ks]
        wide = {n: [emit.broadcast(b, v, n) for v in values] for n in (target.lanes, 1)}
        rows = [emit.at(b, weights, b.mul(one, stride)) for one in ks]

        def body(size: int, index: ir.Value) -> None:
            total = load(b, size, place, index)
            offset = b.mul(index, emit.word(storage.bytes(1)))
            for value, row in zip(wide[size], rows, strict=True):
                here = emit.at(b, row, offset)
                total = emit.fma(b, value, storage.read(b, here, here, size)(0), total)
            emit.store(b, total, place, b.shl(index, emit.word(2)))

        place = of_lane(lane)
        elements(b, width, target.lanes, body)

    lanes = emit.word(order.PARTIAL_SUMS)
    with emit.counting(b, lanes) as lane:
        zero(lane)
    done = emit.slot(b, I64, emit.word(0))
    some = order.PARTIAL_SUMS * _ROWS_AT_ONCE
    with emit.steps(b, done, depth, some) as k, emit.counting(b, lanes) as lane:
        add(b.add(k, lane), lane, _ROWS_AT_ONCE)
    with emit.steps(b, done, depth, 1) as k:
        add(k, b.and_(k, emit.word(order.PARTIAL_SUMS - 1)), 1)
    up = b.add(depth, emit.word(order.BLOCK - 1))
    with emit.steps(b, done, b.and_(up, emit.word(-order.BLOCK)), 1) as k:
        pad(b.and_(k, emit.word(order.PARTIAL_SUMS - 1)))
    _finish(b, matrix, target, sums, emit.at(b, y, b.shl(start, emit.word(2))), (start, width))
    b.ret_void()
    return b.function


def _finish(
    b: ir.IRBuilder,
    matrix: ir.Value,
    target: Target,
    sums: ir.Value,
    y: ir.Value,
    span: tuple[ir.Value, ir.Value],
) -> None:
    """Adds up the partial sums of each output, adds its bias if there is one, and writes it."""
    start, width = span

    def body(size: int, index: ir.Value) -> None:
        places = [emit.at(b, sums, 4 * _STRIP * lane) for lane in range(order.PARTIAL_SUMS)]
        store(b, order.halve(b, [load(b, size, place, index) for place in places]), y, index)

    elements(b, width, target.lanes, body)
    some = b.icmp_unsigned("!=", fields.field(b, matrix, "biases_stride"), emit.word(0))
    with b.if_then(some):
        biases = emit.at(b, fields.field(b, matrix, "biases"), b.shl(start, emit.word(2)))

        def add_bias(size: int, index: ir.Value) -> None:
            store(b, b.fadd(load(b, size, y, index), load(b, size, biases, index)), y, index)

        elements(b, width, target.lanes, add_bias)
