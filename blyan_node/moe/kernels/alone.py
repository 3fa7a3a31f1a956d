"""One row times weights in a form that costs a row some preparation (`Storage.alone`).

The row is copied to the stack with its values in the order in which the weights come
(`Storage.deal`). Each partial sum has the same operands in the same order, so no bit changes.
"""

from collections.abc import Mapping, Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER
from blyan_node.moe.kernels.epilogues import load
from blyan_node.moe.kernels.order import BLOCK, PARTIAL_SUMS
from blyan_node.moe.kernels.storages import Storage
from blyan_node.moe.kernels.targets import Target

_MOST = 1 << 14  # values of a row, which are on the stack
_LINE_BYTES = 64


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
    fits = b.and_(
        b.icmp_signed("<=", depth, emit.word(_MOST)),
        b.icmp_signed("==", b.and_(depth, emit.word(BLOCK - 1)), emit.word(0)),
    )
    with b.if_then(b.and_(b.icmp_signed("==", rows, emit.word(1)), fits)):
        dealt = emit.slot(b, ir.ArrayType(FLOAT, _MOST), align=_LINE_BYTES)
        b.call(_deal(b.module, target, storage), [dealt, x, depth])
        columns, zero = emit.slot(b, I64, first), emit.word(0)
        for width, tile in tiles.items():
            with emit.steps(b, columns, last, width) as column:
                again = emit.constant(ir.IntType(1), 0)
                b.call(tile, [matrix, dealt, zero, y, y_stride, column, again])
        b.ret_void()


def _deal(module: ir.Module, target: Target, storage: Storage) -> ir.Function:
    """out = x, each sixteen of the `count` values in the storage's order."""
    places = (("out", POINTER), ("x", POINTER), ("count", I64))
    b, (out, x, count) = emit.define(module, f"deal_{storage.name}", places)
    with emit.counting(b, count, PARTIAL_SUMS) as index:
        low, high = (
            load(b, target.lanes, x, b.add(index, emit.word(n))) for n in (0, target.lanes)
        )
        for first in (0, target.lanes):
            mine = emit.pick(b, low, high, storage.deal[first : first + target.lanes])
            emit.store(b, mine, out, b.shl(b.add(index, emit.word(first)), emit.word(2)))
    b.ret_void()
    return b.function
