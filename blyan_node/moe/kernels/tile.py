"""The product of a few rows with a few weight rows, and the loops that cover a matrix with it.

A tile holds the partial sums of every pair in registers and walks k once. It computes each pair as
if it were alone: tiles, their remainders and the columns that a thread takes leave no trace.
"""

from collections.abc import Sequence

from llvmlite import ir

from blyan_node.moe.kernels import alone, emit, order
from blyan_node.moe.kernels.emit import I64, POINTER
from blyan_node.moe.kernels.fields import field, length, rows_of, scales_of
from blyan_node.moe.kernels.outputs import finish
from blyan_node.moe.kernels.registers import Registers, add_remainder
from blyan_node.moe.kernels.storages import Storage, Stream
from blyan_node.moe.kernels.targets import Target

LINE_BYTES = 64
_STREAMED = 4  # columns of a single row that are finished together

ARGUMENTS = (
    ("matrix", POINTER), ("x", POINTER), ("x_stride", I64), ("rows", I64),
    ("y", POINTER), ("y_stride", I64), ("first", I64), ("last", I64),
)  # fmt: skip


def product(
    module: ir.Module, storage: Storage, target: Target, many: ir.Function | None = None
) -> ir.Function:
    """`linear_STORAGE`: columns `first` to `last` of y = x · weightsᵀ · scales + biases.

    x is float32 [rows, depth] and y float32 [rows, …], with strides in bytes. `many` computes the
    same and is called where rows are many (`blocks`).
    """
    b, arguments = emit.define(module, f"linear_{storage.name}", ARGUMENTS)
    matrix, x, x_stride, rows, y, y_stride, first, last = arguments
    tiles: dict[tuple[tuple[int, int], Stream | None], ir.Function] = {}
    shapes = target.tiles[storage.effort]
    if storage.alone is not None and alone.helps(target):
        form, width = storage.alone, shapes.few[1][1]
        makers = {n: _tile(module, form, target, (1, n)) for n in (width, 1)}
        alone.one_row(b, target, form, arguments, field(b, matrix, "depth"), makers)

    def sweep(
        columns: ir.Value, heights: Sequence[int], width: int, stream: Stream | None = None
    ) -> None:
        """Covers what is left of the columns, `width` at a time, by tiles of these heights."""
        with emit.steps(b, columns, last, width) as column:
            done = emit.slot(b, I64, emit.word(0))
            for height in heights:
                with emit.steps(b, done, rows, height) as row:
                    kind = (height, width), stream
                    if kind not in tiles:
                        tiles[kind] = _tile(module, storage, target, *kind)
                    x_row = emit.at(b, x, b.mul(row, x_stride))
                    y_row = emit.at(b, y, b.mul(row, y_stride))
                    again = b.icmp_signed("!=", row, emit.word(0))
                    places = [matrix, x_row, x_stride, y_row, y_stride, column, again]
                    b.call(tiles[kind], places)

    if many is not None:
        least = target.many[storage.effort]
        enough = b.icmp_signed(">=", rows, emit.word(least.rows))
        values = b.mul(rows, field(b, matrix, "depth"))
        with b.if_then(b.and_(enough, b.icmp_signed(">=", values, emit.word(least.values)))):
            b.call(many, arguments)
            b.ret_void()
    columns = emit.slot(b, I64, first)
    for stream in storage.streams:
        single = b.icmp_signed("==", rows, emit.word(1))
        short = b.icmp_signed("<=", field(b, matrix, "depth"), emit.word(stream.depth))
        with b.if_then(b.and_(single, short)):
            sweep(columns, [1], _STREAMED, stream)
            sweep(columns, [1], 1, stream)
    for rows_here, (height, width) in sorted(shapes.few.items()):
        with b.if_then(b.icmp_signed("==", rows, emit.word(rows_here))):
            sweep(columns, [height], width)
            sweep(columns, [height], 1)
    height, width = shapes.many
    for most in (width, 1):
        sweep(columns, range(height, 0, -1), most)
    b.ret_void()
    return b.function


def _tile(
    module: ir.Module,
    storage: Storage,
    target: Target,
    shape: tuple[int, int],
    stream: Stream | None = None,
) -> ir.Function:
    """The outputs of `shape` (rows, columns) from column `column` on.

    Columns of a `stream` are read one after another, not side by side.
    """
    rows, columns = shape
    b, arguments = emit.define(
        module,
        _name(storage, shape, stream),
        (("matrix", POINTER), ("x", POINTER), ("x_stride", I64), ("y", POINTER),
         ("y_stride", I64), ("column", I64), ("again", ir.IntType(1))),
    )  # fmt: skip
    matrix, x, x_stride, y, y_stride, column, again = arguments
    xs = [emit.at(b, x, b.mul(x_stride, emit.word(row))) for row in range(rows)]
    weights = rows_of(b, matrix, "weights", column, columns)
    scales = scales_of(b, storage, matrix, column, columns)
    places = list(zip(weights, scales, strict=True))
    sums = Registers.zero(b, rows, columns, target.lanes, storage.deal)
    depth = field(b, matrix, "depth")
    whole = b.and_(depth, emit.word(-order.BLOCK))
    if stream is not None:
        ahead = emit.word(stream.ahead) if stream.ahead else None
        for number, place in enumerate(places):
            _walk(b, storage, sums.of(number), xs, [place], whole, ahead)
    else:
        ahead = b.select(again, emit.word(0), _ahead(b, matrix, columns))
        _walk(b, storage, sums, xs, places, whole, ahead)
    if storage.bits >= 8 and not storage.deal:
        with b.if_then(b.icmp_signed("<", whole, depth), likely=False):
            ends = [(weight, storage.scale_at(b, scale, whole)) for weight, scale in places]
            add_remainder(b, storage, sums, xs, ends, (whole, depth))
    ys = [emit.at(b, y, b.mul(y_stride, emit.word(row))) for row in range(rows)]
    finish(b, storage, matrix, sums, ys, (column, columns))
    b.ret_void()
    return b.function


def _name(storage: Storage, shape: tuple[int, int], stream: Stream | None) -> str:
    rows, columns = shape
    kind = "tile" if stream is None else f"stream{stream.depth}"
    return f"{kind}_{storage.name}_{rows}x{columns}"


def _walk(
    b: ir.IRBuilder,
    storage: Storage,
    sums: Registers,
    xs: Sequence[ir.Value],
    places: Sequence[tuple[ir.Value, ir.Value]],
    whole: ir.Value,
    ahead: ir.Value | None = None,
) -> None:
    """Adds the products of all k before `whole`, columns side by side.

    `places` are addresses of columns' first weights, each with that of its first scale. Meanwhile
    it asks for what lies `ahead` bytes on.
    """
    with emit.counting(b, whole, order.BLOCK) as k:
        parts = []
        if ahead is not None:
            # The rows of a tile that is ahead lie one after another: they are asked for so.
            so_far = length(b, storage, b.mul(k, emit.word(len(places))))
            coming = emit.at(b, places[0][0], b.add(ahead, so_far))
            for line in range(0, storage.bytes(order.BLOCK) * len(places), LINE_BYTES):
                emit.prefetch(b, emit.at(b, coming, line))
        for weight, scale in places:
            block = emit.at(b, weight, length(b, storage, k))
            parts.append(storage.read(b, block, storage.scale_at(b, scale, k), sums.lanes))
        here = [emit.at(b, row, b.shl(k, emit.word(2))) for row in xs]
        sums.add_block(b, here, parts)


def _ahead(b: ir.IRBuilder, matrix: ir.Value, columns: int) -> ir.Value:
    """The distance in bytes to the same place in a tile that is a while ahead."""
    tile = b.mul(field(b, matrix, "weights_stride"), emit.word(columns))
    return b.mul(tile, field(b, matrix, "tiles_ahead"))
