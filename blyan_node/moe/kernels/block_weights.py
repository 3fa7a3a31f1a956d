"""Float32 copies of a block's weights, for the rows of a product of many (`blocks`)."""

from llvmlite import ir

from blyan_node.moe.kernels import emit, fields, order
from blyan_node.moe.kernels.emit import I64, POINTER
from blyan_node.moe.kernels.padding import pad
from blyan_node.moe.kernels.storages import Parts, Storage
from blyan_node.moe.kernels.targets import Target

DEPTH = 384  # of a block
COLUMNS = 12  # of a strip: its block takes 18 KiB

_WIDEN = (
    ("matrix", POINTER), ("column", I64), ("width", I64),
    ("k", I64), ("length", I64), ("weights", POINTER),
)  # fmt: skip


def widen(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
    """`widen_STORAGE`: float32 of `length` weights from `k` on, of each of `width` columns."""
    b, arguments = emit.define(module, f"widen_{storage.name}", _WIDEN)
    matrix, column, width, k, length, weights = arguments
    with emit.counting(b, width) as number:
        (start,) = fields.rows_of(b, matrix, "weights", b.add(column, number), 1)
        (scales,) = fields.scales_of(b, storage, matrix, b.add(column, number), 1)
        out = emit.at(b, weights, b.mul(number, emit.word(4 * DEPTH)))
        with emit.counting(b, length, order.BLOCK) as offset:
            at = b.add(k, offset)
            block = emit.at(b, start, fields.length(b, storage, at))
            scale = storage.scale_at(b, scales, at)
            parts = storage.read(b, block, scale, target.lanes)
            _store_block(b, parts, target, emit.at(b, out, b.shl(offset, emit.word(2))))
    b.ret_void()
    return b.function


def ahead(
    b: ir.IRBuilder, storage: Storage, matrix: ir.Value, k: ir.Value, length: ir.Value
) -> ir.Value:
    """From a block's weights to those of the next one, in bytes; at the end, of the next strip."""
    strip = b.mul(fields.field(b, matrix, "weights_stride"), emit.word(COLUMNS))
    back, on = (fields.length(b, storage, weights) for weights in (k, length))
    ends = b.add(b.add(k, length), emit.word(order.BLOCK))
    last = b.icmp_signed(">", ends, fields.field(b, matrix, "depth"))
    return b.select(last, b.sub(strip, back), on)


def widen_tail(module: ir.Module, storage: Storage, target: Target) -> ir.Function:
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
        _store_block(b, parts, target, emit.at(b, weights, b.mul(number, emit.word(4 * DEPTH))))
    b.ret_void()
    return b.function


def _store_block(b: ir.IRBuilder, parts: Parts, target: Target, out: ir.Value) -> None:
    for part in range(order.BLOCK // target.lanes):
        emit.store(b, parts(part), out, 4 * target.lanes * part)
