"""The block that a row ends in, continued with zeros, without reading beyond the row."""

from llvmlite import ir

from blyan_node.moe.kernels import emit, order
from blyan_node.moe.kernels.emit import I8, I64, POINTER


def padded(b: ir.IRBuilder, start: ir.Value, count: ir.Value, size: int) -> ir.Value:
    """A copy of `count` values of `size` bytes, followed by zeros to a whole block."""
    block = emit.slot(b, ir.ArrayType(I8, size * order.BLOCK))
    pad(b, block, start, count, size)
    return block


def pad(b: ir.IRBuilder, block: ir.Value, start: ir.Value, count: ir.Value, size: int) -> None:
    """Writes them to `block`."""
    name = f"pad_{size}"
    function = b.module.globals.get(name) or _pad(b.module, name, size)
    b.call(function, [block, start, count])


def _pad(module: ir.Module, name: str, size: int) -> ir.Function:
    """The function behind `pad`."""
    kind = ir.IntType(8 * size)
    places = (("block", POINTER), ("start", POINTER), ("count", I64))
    b, (block, start, count) = emit.define(module, name, places)
    for offset in range(size):
        zeros = emit.constant(emit.vector(I8, order.BLOCK), 0)
        emit.store(b, zeros, block, offset * order.BLOCK)
    with emit.counting(b, count) as index:
        offset = b.mul(index, emit.word(size))
        emit.store(b, emit.load(b, kind, start, offset), block, offset)
    b.ret_void()
    return b.function
