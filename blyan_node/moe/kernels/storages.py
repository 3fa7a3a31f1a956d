"""How weights lie in memory, and how 32 of them become float32 in registers.

Every storage gives its weights in the order of their index, so that the bits of a product are those
of the same values in any other storage. What a byte stands for is exact; only FP8 is taken at 1/256
of its value, which the end of a product makes good (`Storage.unit`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I16, I32, vector

# Part p of a block: a register with its weights p * lanes, p * lanes + 1, …
Parts = Callable[[int], ir.Value]


@dataclass(frozen=True)
class Storage:
    """`bits` of a weight, and `read(b, block, scale, lanes)`: the parts of the block of 32 there.

    `scale` points to the block's scale byte in a storage that has one (`scaled`).
    """

    name: str
    bits: int
    read: Callable[[ir.IRBuilder, ir.Value, ir.Value, int], Parts]
    unit: float = 1.0
    scaled: bool = False

    def bytes(self, weights: int) -> int:
        """The length of so many weights."""
        return -(-weights * self.bits // 8)


def _float32(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    return lambda part: emit.load(b, vector(FLOAT, lanes), block, 4 * lanes * part)


def _bfloat16(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    def part(number: int) -> ir.Value:
        raw = emit.load(b, vector(I16, lanes), block, 2 * lanes * number)
        wide = b.zext(raw, vector(I32, lanes))
        return b.bitcast(b.shl(wide, emit.constant(wide.type, 16)), vector(FLOAT, lanes))

    return part


STORAGES = {
    storage.name: storage
    for storage in (
        Storage("float32", 32, _float32),
        Storage("bfloat16", 16, _bfloat16),
    )
}
