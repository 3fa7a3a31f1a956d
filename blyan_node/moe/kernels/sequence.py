"""`run`: kernels that were called once are called again, with one call from Python."""

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER

# A step in memory: the address of a kernel, what it is given in words of 8 bytes, then two float32.
# The convention of calls on x86-64 has registers of their own for floats, and whoever calls clears
# up, so that a kernel takes what it knows of and leaves the rest.
WORDS = 10
FLOATS = 2
STEP_BYTES = 8 * (1 + WORDS) + 4 * FLOATS

ARGUMENTS = (("steps", POINTER), ("count", I64))


def run(module: ir.Module) -> ir.Function:
    """Makes `count` steps, one after another."""
    b, (steps, count) = emit.define(module, "run", ARGUMENTS)
    with emit.counting(b, count) as number:
        make(b, steps, number)
    b.ret_void()
    return b.function


def make(b: ir.IRBuilder, steps: ir.Value, number: ir.Value) -> None:
    """Makes one of the steps."""
    kind = ir.FunctionType(emit.VOID, [I64] * WORDS + [FLOAT] * FLOATS)
    step = emit.at(b, steps, b.mul(number, emit.word(STEP_BYTES)))
    words = [emit.load(b, I64, step, 8 * (1 + i)) for i in range(WORDS)]
    floats = [emit.load(b, FLOAT, step, 8 * (1 + WORDS) + 4 * i) for i in range(FLOATS)]
    b.call(emit.load(b, kind.as_pointer(), step), words + floats)
