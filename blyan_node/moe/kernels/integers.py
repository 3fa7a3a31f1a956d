"""Instructions on whole numbers that LLVM has no name of its own for, as each target has them."""

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import I8, I32, vector
from blyan_node.moe.kernels.targets import Target


def products(b: ir.IRBuilder, target: Target, x: ir.Value, w: ir.Value) -> ir.Value:
    """x · w of int16 [16], every two of them added: int32 [8]."""
    if "avx2" in target.needs:
        return emit.intrinsic(b, "llvm.x86.avx2.pmadd.wd", vector(I32, 8), [x, w])
    low, high = (
        emit.intrinsic(
            b,
            "llvm.x86.sse2.pmadd.wd",
            vector(I32, 4),
            [emit.pick(b, value, value, range(first, first + 8)) for value in (x, w)],
        )
        for first in (0, 8)
    )
    return emit.pick(b, low, high, range(8))


def look_up(b: ir.IRBuilder, target: Target, table: list[int], codes: ir.Value) -> ir.Value:
    """The byte of a table of sixteen that each of 32 codes from 0 to 15 stands for."""
    kind, half = vector(I8, 32), vector(I8, 16)
    if "avx2" in target.needs:
        whole = ir.Constant(kind, table * 2)
        return emit.intrinsic(b, "llvm.x86.avx2.pshuf.b", kind, [whole, codes])
    low, high = (
        emit.intrinsic(
            b,
            "llvm.x86.ssse3.pshuf.b.128",
            half,
            [ir.Constant(half, table), emit.pick(b, codes, codes, range(first, first + 16))],
        )
        for first in (0, 16)
    )
    return emit.pick(b, low, high, range(32))
