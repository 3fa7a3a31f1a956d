"""The order of a sum, as docs/sums.md says it, in vectors of any width.

Sixteen partial sums are held in 16 / lanes registers. A block of 32 products adds two to each, and
at the end the upper half is added to the lower until one is left. How many outputs are folded
together, and in registers of which width, changes no operand of any addition.
"""

from collections.abc import Sequence

from llvmlite import ir

from blyan_node.moe.kernels import emit

# The name of the order in a numeric profile; whoever changes a bit of any result changes it.
CONTRACT = "sums3"
PARTIAL_SUMS = 16
BLOCK = 32


def halve(b: ir.IRBuilder, sums: Sequence[ir.Value]) -> ir.Value:
    """The registers of one output's partial sums, added up until one is left."""
    sums = list(sums)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [b.fadd(low, high) for low, high in zip(sums[:half], sums[half:], strict=True)]
    return sums[0]


def total(b: ir.IRBuilder, outputs: Sequence[ir.Value]) -> ir.Value:
    """One register of partial sums for each of 1, 2, 4 … outputs: a vector with a sum for each."""
    assert len(outputs).bit_count() == 1
    vectors = [(value, 1) for value in outputs]  # a register, and how many outputs are in it
    while len(vectors) > 1:
        vectors = [_join(b, *pair) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
    value, held = vectors[0]
    while value.type.count > held:
        value, held = _fold(b, value, held)
    return value


def _fold(b: ir.IRBuilder, value: ir.Value, held: int) -> tuple[ir.Value, int]:
    """Halves the partial sums of each output in a register, which becomes half as wide."""
    size = value.type.count // held
    low = [output * size + lane for output in range(held) for lane in range(size // 2)]
    high = [lane + size // 2 for lane in low]
    return b.fadd(emit.pick(b, value, value, low), emit.pick(b, value, value, high)), held


def _join(
    b: ir.IRBuilder, first: tuple[ir.Value, int], second: tuple[ir.Value, int]
) -> tuple[ir.Value, int]:
    """Halves the partial sums of each output in two registers, which become one of that width."""
    (left, held), (right, _) = first, second
    width = left.type.count
    size = width // held
    low = [output * size + lane for output in range(held) for lane in range(size // 2)]
    low += [width + lane for lane in low]
    high = [lane + size // 2 for lane in low]
    return b.fadd(emit.pick(b, left, right, low), emit.pick(b, left, right, high)), 2 * held


def one_nan(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The value, with one bit pattern for all NaNs: which operand's survives is not written."""
    odd = b.fcmp_unordered("uno", value, value)
    return b.select(odd, emit.constant(value.type, float("nan")), value)
