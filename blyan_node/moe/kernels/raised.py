"""One row times weights that are read as 2^24 times what they are (`Storage.raised`).

The row is divided by as much, so each product is the same real number and each sum has the same
bits: unless a value is so small that its last bits would be lost. Then nothing is done here.
"""

from collections.abc import Mapping, Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I32, I64, POINTER
from blyan_node.moe.kernels.epilogues import elements, load
from blyan_node.moe.kernels.storages import RAISED
from blyan_node.moe.kernels.targets import Target

_MOST = 1 << 14  # values of a row, which are on the stack
_LINE_BYTES = 64


def helps(target: Target) -> bool:
    """Whether raised weights are made faster: where bytes move in registers of 8 lanes."""
    return target.lanes == 8 and "avx2" in target.needs


def one_row(
    b: ir.IRBuilder,
    target: Target,
    arguments: Sequence[ir.Value],
    depth: ir.Value,
    tiles: Mapping[int, ir.Function],
) -> None:
    """In a product with `tile.ARGUMENTS`: computes all and returns if that can be done.

    `depth` is the matrix's; `tiles` are of one row, by their columns, the widest first.
    """
    matrix, x, _, rows, y, y_stride, first, last = arguments
    function = b.module.globals.get("lower") or _lower(b.module, target)
    fits = b.icmp_signed("<=", depth, emit.word(_MOST))
    with b.if_then(b.and_(b.icmp_signed("==", rows, emit.word(1)), fits)):
        lowered = emit.slot(b, ir.ArrayType(FLOAT, _MOST), align=_LINE_BYTES)
        lost = emit.slot(b, I64)
        b.call(function, [lowered, x, depth, lost])
        with b.if_then(b.icmp_unsigned("==", b.load(lost, typ=I64), emit.word(0))):
            columns, zero = emit.slot(b, I64, first), emit.word(0)
            for width, tile in tiles.items():
                with emit.steps(b, columns, last, width) as column:
                    again = emit.constant(ir.IntType(1), 0)
                    b.call(tile, [matrix, lowered, zero, y, y_stride, column, again])
            b.ret_void()


def _lower(module: ir.Module, target: Target) -> ir.Function:
    """out = x / 2^24, `count` values; `lost` is not 0 if that changed more than an exponent."""
    places = (("out", POINTER), ("x", POINTER), ("count", I64), ("lost", POINTER))
    b, (out, x, count, lost) = emit.define(module, "lower", places)
    emit.store(b, emit.word(0), lost)

    def body(width: int, index: ir.Value) -> None:
        value = load(b, width, x, index)
        low = b.fmul(value, emit.constant(value.type, 1 / RAISED))
        other = b.fcmp_ordered("one", b.fmul(low, emit.constant(value.type, RAISED)), value)
        bits = b.bitcast(b.sext(other, emit.vector(I32, width)), ir.IntType(32 * width))
        some = b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))
        emit.store(b, b.or_(emit.load(b, I64, lost), b.zext(some, I64)), lost)
        emit.store(b, low, out, b.shl(index, emit.word(2)))

    elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function
