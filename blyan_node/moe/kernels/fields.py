"""What a kernel is told about a matrix, and where its weights and scales are."""

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import I64, POINTER
from blyan_node.moe.kernels.storages import Storage

# The fields of a matrix in memory, each of 8 bytes (`matrix.Matrix` fills them). Strides are in
# bytes from one output to the next; a stride of 0 repeats one value.
FIELDS = (
    "weights", "weights_stride", "block_scales", "block_scales_stride",
    "scales", "scales_stride", "biases", "biases_stride", "depth", "tiles_ahead",
)  # fmt: skip


def field(b: ir.IRBuilder, matrix: ir.Value, name: str) -> ir.Value:
    """One field of a matrix: an address or a number."""
    kind = POINTER if name in ("weights", "block_scales", "scales", "biases") else I64
    return emit.load(b, kind, matrix, 8 * FIELDS.index(name))


def rows_of(
    b: ir.IRBuilder, matrix: ir.Value, name: str, column: ir.Value, columns: int
) -> list[ir.Value]:
    """The addresses of a field's values for each of some columns."""
    start, stride = field(b, matrix, name), field(b, matrix, f"{name}_stride")
    return [emit.at(b, start, b.mul(b.add(column, emit.word(j)), stride)) for j in range(columns)]


def scales_of(
    b: ir.IRBuilder, storage: Storage, matrix: ir.Value, column: ir.Value, columns: int
) -> list[ir.Value]:
    """The addresses of the first block scale of each of some columns; none are read without."""
    if storage.grid is None or storage.grid.outs == 1:
        return rows_of(b, matrix, "block_scales", column, columns)
    start, stride = (field(b, matrix, name) for name in ("block_scales", "block_scales_stride"))
    shift = emit.word(storage.grid.outs.bit_length() - 1)
    rows = [b.lshr(b.add(column, emit.word(j)), shift) for j in range(columns)]
    return [emit.at(b, start, b.mul(row, stride)) for row in rows]


def length(b: ir.IRBuilder, storage: Storage, weights: ir.Value) -> ir.Value:
    """The bytes of a number of weights."""
    return b.lshr(b.mul(weights, emit.word(storage.bits)), emit.word(3))
