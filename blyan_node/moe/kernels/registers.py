"""The partial sums of a tile's pairs, in registers, to which blocks of 32 products are added.

The last block of a row may be shorter. It is added as if zeros followed, by a function of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from blyan_node.moe.kernels import emit, order
from blyan_node.moe.kernels.emit import FLOAT, I64, POINTER
from blyan_node.moe.kernels.padding import padded
from blyan_node.moe.kernels.storages import Parts, Storage


@dataclass(frozen=True)
class Registers:
    """The stack slots of a tile's partial sums: `slots[row][column][register]`."""

    slots: list[list[list[ir.Value]]]
    lanes: int
    deal: Sequence[int] = ()  # which sums the lanes have, if not in their order

    @staticmethod
    def zero(
        b: ir.IRBuilder, rows: int, columns: int, lanes: int, deal: Sequence[int] = ()
    ) -> "Registers":
        """Sums of nothing."""
        kind = emit.vector(FLOAT, lanes)
        zero = emit.constant(kind, 0.0)
        count = order.PARTIAL_SUMS // lanes
        slots = [
            [[emit.slot(b, kind, zero) for _ in range(count)] for _ in range(columns)]
            for _ in range(rows)
        ]
        return Registers(slots, lanes, deal)

    def of(self, column: int) -> "Registers":
        """Those of one column, the same slots."""
        return Registers([[row[column]] for row in self.slots], self.lanes, self.deal)

    def add_block(
        self,
        b: ir.IRBuilder,
        xs: Sequence[ir.Value],
        weights: Sequence[Parts],
    ) -> None:
        """Adds 32 products to each pair; `xs` point to the rows' values of this block."""
        kind = emit.vector(FLOAT, self.lanes)
        registers = order.PARTIAL_SUMS // self.lanes
        for part in range(order.BLOCK // self.lanes):
            for column, weight in enumerate(weights):
                w = weight(part)
                for row, x in zip(self.slots, xs, strict=True):
                    value = emit.load(b, kind, x, 4 * self.lanes * part)
                    place = row[column][part % registers]
                    b.store(emit.fma(b, value, w, b.load(place, typ=kind)), place)
            # Left to itself LLVM loads for the next part first and runs out of registers.
            emit.keep_order(b)

    def totals(self, b: ir.IRBuilder, row: int, columns: Sequence[int]) -> ir.Value:
        """The sums of one row's pairs."""
        kind = emit.vector(FLOAT, self.lanes)
        pairs = [[b.load(s, typ=kind) for s in self.slots[row][column]] for column in columns]
        if self.deal:
            places = [self.deal.index(number) for number in range(order.PARTIAL_SUMS)]
            halves = places[: self.lanes], places[self.lanes :]
            pairs = [[emit.pick(b, low, high, half) for half in halves] for low, high in pairs]
        return order.total(b, [order.halve(b, pair) for pair in pairs])


def add_remainder(
    b: ir.IRBuilder,
    storage: Storage,
    sums: Registers,
    xs: Sequence[ir.Value],
    weights: Sequence[tuple[ir.Value, ir.Value]],
    span: tuple[ir.Value, ir.Value],
) -> None:
    """Adds the block that depth ends in, pair by pair; few models have one.

    `weights` are addresses of columns' first weights, each with that of the block's scale.
    """
    done, depth = span
    left = b.sub(depth, done)
    name = f"remainder_{storage.name}"
    function = b.module.globals.get(name) or _remainder(b.module, name, storage, sums.lanes)
    kind = emit.vector(FLOAT, sums.lanes)
    place = emit.slot(b, ir.ArrayType(FLOAT, order.PARTIAL_SUMS))
    for row, x in zip(sums.slots, xs, strict=True):
        x_left = emit.at(b, x, b.shl(done, emit.word(2)))
        for pair, (weight, scale) in zip(row, weights, strict=True):
            w_left = emit.at(b, weight, b.mul(done, emit.word(storage.bytes(1))))
            for number, register in enumerate(pair):
                emit.store(b, b.load(register, typ=kind), place, 4 * sums.lanes * number)
            b.call(function, [place, x_left, w_left, scale, left])
            for number, register in enumerate(pair):
                b.store(emit.load(b, kind, place, 4 * sums.lanes * number), register)


def _remainder(module: ir.Module, name: str, storage: Storage, lanes: int) -> ir.Function:
    """Adds `left` products, as if zeros followed, to the sums at `place`.

    Reads nothing beyond the rows.
    """
    pointers = ((argument, POINTER) for argument in ("place", "x", "weight", "scale"))
    b, (place, x, weight, scale, left) = emit.define(module, name, (*pointers, ("left", I64)))
    sums, kind = Registers.zero(b, 1, 1, lanes), emit.vector(FLOAT, lanes)
    ((registers,),) = sums.slots
    for number, register in enumerate(registers):
        b.store(emit.load(b, kind, place, 4 * lanes * number), register)
    block = padded(b, weight, left, storage.bytes(1))
    sums.add_block(b, [padded(b, x, left, 4)], [storage.read(b, block, scale, lanes)])
    for number, register in enumerate(registers):
        emit.store(b, b.load(register, typ=kind), place, 4 * lanes * number)
    b.ret_void()
    return b.function
