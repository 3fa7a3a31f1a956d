"""One row times weights in a form that costs a row some preparation (`Storage.alone`).

The row is copied to the stack: its values in the order in which the weights come (`Storage.deal`),
divided by what these are multiplied by (`Storage.raised`). Each product is the same real number and
each partial sum has the same operands in the same order, so no bit changes: unless a value is so
small that dividing it loses its last bits. Then nothing is done here, as for depths above
`Storage.longest`.
"""

from collections.abc import Mapping, Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I32, I64, POINTER
from blyan_node.moe.kernels.epilogues import elements, load
from blyan_node.moe.kernels.order import BLOCK, PARTIAL_SUMS
from blyan_node.moe.kernels.storages import Storage
from blyan_node.moe.kernels.targets import Target

_LINE_BYTES = 64
_PLACES = (("out", POINTER), ("x", POINTER), ("count", I64), ("lost", POINTER))


def helps(target: Target) -> bool:
    """Whether such forms are faster: where registers of 8 lanes move bytes."""
    return target.lanes == 8 and "avx2" in target.needs


def one_row(
    b: ir.IRBuilder,
    target: Target,
    storage: Storage,
    arguments: Sequence[ir.Value],
    depth: ir.Value,
    tiles: Mapping[int, ir.Function],
) -> None:
    """In a product with `tile.ARGUMENTS`: computes all and returns if that can be done.

    `depth` is the matrix's; `tiles` are of one row, by their columns, the widest first.
    """
    matrix, x, _, rows, y, y_stride, first, last = arguments
    prepare = _dealt if storage.deal else _lowered
    fits = b.icmp_signed("<=", depth, emit.word(storage.longest))
    if storage.deal:
        ends = b.icmp_signed("==", b.and_(depth, emit.word(BLOCK - 1)), emit.word(0))
        fits = b.and_(fits, ends)
    with b.if_then(b.and_(b.icmp_signed("==", rows, emit.word(1)), fits)):
        prepared = emit.slot(b, ir.ArrayType(FLOAT, storage.longest), align=_LINE_BYTES)
        lost = emit.slot(b, I64, emit.word(0))
        b.call(prepare(b.module, target, storage), [prepared, x, depth, lost])
        with b.if_then(b.icmp_unsigned("==", b.load(lost, typ=I64), emit.word(0))):
            columns, zero = emit.slot(b, I64, first), emit.word(0)
            for width, tile in tiles.items():
                with emit.steps(b, columns, last, width) as column:
                    again = emit.constant(ir.IntType(1), 0)
                    b.call(tile, [matrix, prepared, zero, y, y_stride, column, again])
            b.ret_void()


def _lowered(module: ir.Module, target: Target, storage: Storage) -> ir.Function:
    """out = x / raised, `count` values; `lost` is not 0 if that changed more than an exponent."""
    b, (out, x, count, lost) = emit.define(module, f"prepare_{storage.name}", _PLACES)

    def body(width: int, index: ir.Value) -> None:
        value = load(b, width, x, index)
        low = b.fmul(value, emit.constant(value.type, 1 / storage.raised))
        raised = b.fmul(low, emit.constant(value.type, storage.raised))
        other = b.fcmp_ordered("one", raised, value)
        bits = b.bitcast(b.sext(other, emit.vector(I32, width)), ir.IntType(32 * width))
        some = b.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))
        emit.store(b, b.or_(emit.load(b, I64, lost), b.zext(some, I64)), lost)
        emit.store(b, low, out, b.shl(index, emit.word(2)))

    elements(b, count, target.lanes, body)
    b.ret_void()
    return b.function


def _dealt(module: ir.Module, target: Target, storage: Storage) -> ir.Function:
    """out = x, each sixteen of the `count` values in the storage's order; nothing is lost."""
    b, (out, x, count, _) = emit.define(module, f"prepare_{storage.name}", _PLACES)
    with emit.counting(b, count, PARTIAL_SUMS) as index:
        low, high = (
            load(b, target.lanes, x, b.add(index, emit.word(n))) for n in (0, target.lanes)
        )
        for first in (0, target.lanes):
            mine = emit.pick(b, low, high, storage.deal[first : first + target.lanes])
            emit.store(b, mine, out, b.shl(b.add(index, emit.word(first)), emit.word(2)))
    b.ret_void()
    return b.function
