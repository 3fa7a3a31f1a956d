"""What a product ends in: sums are added up, scaled, given their biases and written."""

from collections.abc import Sequence
from typing import Protocol

from llvmlite import ir

from blyan_node.moe.kernels import emit, order
from blyan_node.moe.kernels.emit import FLOAT
from blyan_node.moe.kernels.fields import rows_of
from blyan_node.moe.kernels.storages import Storage

_FACTORS = "scales", "biases"


class Sums(Protocol):
    """The partial sums of pairs, wherever they are."""

    def totals(self, b: ir.IRBuilder, row: int, columns: Sequence[int]) -> ir.Value:
        """The sums of one row's pairs."""


def finish(
    b: ir.IRBuilder,
    storage: Storage,
    matrix: ir.Value,
    sums: Sums,
    ys: Sequence[ir.Value],
    span: tuple[ir.Value, int],
) -> None:
    """Adds up each pair, scales it, adds its bias and writes it."""
    column, columns = span
    offset = b.shl(column, emit.word(2))
    first = 0
    while first < columns:
        count = 1 << ((columns - first).bit_length() - 1)
        given = factors(b, matrix, b.add(column, emit.word(first)), count)
        for row, y in enumerate(ys):
            value = output(b, storage, sums.totals(b, row, range(first, first + count)), given)
            emit.store(b, value, y, b.add(offset, emit.word(4 * first)))
        first += count


Factors = tuple[ir.Value, ir.Value]


def factors(b: ir.IRBuilder, matrix: ir.Value, column: ir.Value, columns: int) -> Factors:
    """The scales and biases of some columns."""
    scales, biases = (_gather(b, rows_of(b, matrix, name, column, columns)) for name in _FACTORS)
    return scales, biases


def output(b: ir.IRBuilder, storage: Storage, totals: ir.Value, given: Factors) -> ir.Value:
    """The outputs with these sums."""
    scales, biases = given
    if storage.unit != 1.0:
        totals = b.fmul(totals, emit.constant(totals.type, storage.unit))
    return order.one_nan(b, b.fadd(b.fmul(totals, scales), biases))


def _gather(b: ir.IRBuilder, addresses: Sequence[ir.Value]) -> ir.Value:
    """A vector of the float32 at each address."""
    value = ir.Constant(emit.vector(FLOAT, len(addresses)), ir.Undefined)
    for lane, address in enumerate(addresses):
        value = b.insert_element(value, emit.load(b, FLOAT, address), ir.Constant(emit.I32, lane))
    return value
