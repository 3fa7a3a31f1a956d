"""The rule of MXFP4 with rows of whole numbers: 32 values have a power of two, as 32 weights have.

Each eight products are summed exactly. That sum is added to a partial sum, times the powers of its
block. A register has the sums of two blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I8, I16, I64, POINTER, constant, vector
from blyan_node.moe.kernels.fields import field, rows_of
from blyan_node.moe.kernels.integers import look_up, products
from blyan_node.moe.kernels.order import BLOCK, PARTIAL_SUMS
from blyan_node.moe.kernels.quantising import make_blocks_whole
from blyan_node.moe.kernels.registers import Registers
from blyan_node.moe.kernels.storages import powers_of_two
from blyan_node.moe.kernels.targets import Target
from blyan_node.moe.kernels.tile import LINE_BYTES
from blyan_node.moe.kernels.whole import LONGEST, Rows, Rule

_LANES = 8
_REGISTERS = PARTIAL_SUMS // _LANES  # of a pair
_UNROLLED = 4  # registers at a time, of one row
# Twice the value of each E2M1 code; as the upper byte of sixteen bits it is 512 times the value.
_TWICE = [0, 1, 2, 3, 4, 6, 8, 12]
_TWICE += [-number for number in _TWICE]


def _add(
    b: ir.IRBuilder, target: Target, matrix: ir.Value, rows: Rows, columns: Sequence[ir.Value]
) -> Registers:
    """The partial sums of a tile's pairs."""
    kind = vector(FLOAT, _LANES)
    slots = [
        [[emit.slot(b, kind, constant(kind, 0.0)) for _ in range(_REGISTERS)] for _ in columns]
        for _ in rows.numbers
    ]
    blocks = b.lshr(field(b, matrix, "depth"), emit.word(BLOCK.bit_length() - 1))
    weights, scales = (
        [rows_of(b, matrix, name, column, 1)[0] for column in columns]
        for name in ("weights", "block_scales")
    )
    units = _units(b, scales, rows.powers, blocks)
    for column, weight in enumerate(weights):
        pairs = [
            _Pair(x, of_columns[column], sums[column])
            for x, of_columns, sums in zip(rows.numbers, units, slots, strict=True)
        ]
        _add_column(b, target, weight, pairs, blocks)
    return Registers(slots, _LANES)


@dataclass(frozen=True)
class _Pair:
    """What a row has with a column: the addresses of numbers and units, and its partial sums."""

    numbers: ir.Value
    units: ir.Value
    sums: Sequence[ir.Value]


def _add_column(
    b: ir.IRBuilder,
    target: Target,
    weight: ir.Value,
    pairs: Sequence[_Pair],
    blocks: ir.Value,
) -> None:
    """Adds the products of a column to the partial sums of each row."""
    done = emit.slot(b, I64, emit.word(0))
    for step in (_UNROLLED, _REGISTERS) if len(pairs) == 1 else (_REGISTERS,):
        with emit.steps(b, done, blocks, 2 * step) as block:
            for number in range(step):
                at = b.add(block, emit.word(2 * number))
                _add_blocks(b, target, weight, pairs, at, number % _REGISTERS)
    register = emit.slot(b, I64, emit.word(0))
    with emit.steps(b, done, blocks, 2) as block:
        _add_blocks(b, target, weight, pairs, block, 0)
        b.store(emit.word(1), register)
    block = b.load(done, typ=I64)
    with b.if_then(b.icmp_signed("<", block, blocks), likely=False):
        first = b.icmp_signed("==", b.load(register, typ=I64), emit.word(0))
        with b.if_else(first) as cases:
            for number, case in enumerate(cases):
                with case:
                    _add_blocks(b, target, weight, pairs, block, number, last=True)


def _add_blocks(
    b: ir.IRBuilder,
    target: Target,
    weight: ir.Value,
    pairs: Sequence[_Pair],
    block: ir.Value,
    register: int,
    *,
    last: bool = False,
) -> None:
    """Adds the products of two blocks to that register of each row, or of the last one."""
    kind, sixteen = vector(FLOAT, _LANES), vector(I16, 16)
    place = emit.at(b, weight, b.mul(block, emit.word(BLOCK // 2)))
    codes = _codes(b, target, place, last=last)
    for pair in pairs:
        numbers = emit.at(b, pair.numbers, b.mul(block, emit.word(2 * BLOCK)))
        total: ir.Value = None
        for number, w in enumerate(codes):
            found = products(b, target, emit.load(b, sixteen, numbers, BLOCK * number), w)
            total = found if total is None else b.add(total, found)
        units = emit.load(b, vector(FLOAT, 2), pair.units, b.shl(block, emit.word(2)))
        factors = emit.pick(b, units, units, [0] * 4 + [1] * 4)
        before = b.load(pair.sums[register], typ=kind)
        after = emit.fma(b, b.sitofp(total, kind), factors, before)
        if last:
            after = emit.pick(b, after, before, [*range(4), *range(12, 16)])
        b.store(after, pair.sums[register])
    emit.keep_order(b)


def _codes(b: ir.IRBuilder, target: Target, place: ir.Value, *, last: bool) -> list[ir.Value]:
    """512 times the codes of two blocks, in the order of `quantising.DEALT`: int16 [16], four."""
    whole, sixteen = vector(I8, 32), vector(I16, 16)
    if last:
        half = emit.load(b, vector(I8, 16), place)
        raw = emit.pick(b, half, constant(half.type, 0), range(32))
    else:
        raw = emit.load(b, whole, place)
    found = []
    for codes in (raw, b.bitcast(b.lshr(b.bitcast(raw, sixteen), constant(sixteen, 4)), whole)):
        low = b.and_(codes, constant(whole, 0x0F))
        twice = b.bitcast(look_up(b, target, _TWICE, low), sixteen)
        found += [b.shl(twice, constant(sixteen, 8)), b.and_(twice, constant(sixteen, -1 << 8))]
    return found


def _units(
    b: ir.IRBuilder, scales: Sequence[ir.Value], powers: Sequence[ir.Value], blocks: ir.Value
) -> list[list[ir.Value]]:
    """The addresses of what the blocks' whole numbers are times, by row and column."""
    size, rows, columns = 4 * LONGEST // BLOCK + LINE_BYTES, len(powers), len(scales)
    place = emit.slot(b, ir.ArrayType(I8, rows * columns * size))
    units = [emit.at(b, place, size * number) for number in range(rows * columns)]
    name = f"units_{rows}x{columns}"
    function = b.module.globals.get(name) or _units_of(b.module, name, (rows, columns))
    b.call(function, [blocks, *scales, *powers, *units])
    return [units[first : first + columns] for first in range(0, len(units), columns)]


def _units_of(module: ir.Module, name: str, shape: tuple[int, int]) -> ir.Function:
    """units = 2^(scales - 127) · powers, of so many blocks, for each row and column."""
    rows, columns = shape
    pointers = [(f"place_{n}", POINTER) for n in range(columns + rows + rows * columns)]
    b, (blocks, *places) = emit.define(module, name, (("blocks", I64), *pointers))
    scales, powers, units = places[:columns], places[columns:][:rows], places[columns + rows :]

    def multiply(block: ir.Value, lanes: int) -> None:
        at, kind = b.shl(block, emit.word(2)), vector(I8, lanes)
        of_weights = [powers_of_two(b, emit.load(b, kind, one, block)) for one in scales]
        of_rows = [emit.load(b, vector(FLOAT, lanes), one, at) for one in powers]
        pairs = [(row, weight) for row in of_rows for weight in of_weights]
        for place, (row, weight) in zip(units, pairs, strict=True):
            emit.store(b, b.fmul(row, weight), place, at)

    done = emit.slot(b, I64, emit.word(0))
    with emit.steps(b, done, blocks, _LANES) as block:
        multiply(block, _LANES)
    left, last = b.load(done, typ=I64), b.sub(blocks, emit.word(_LANES))
    with b.if_else(b.icmp_signed(">=", last, emit.word(0))) as (then, otherwise):
        with then:
            multiply(last, _LANES)  # some of them again
        with otherwise, emit.counting(b, blocks, first=left) as block:
            multiply(block, 1)
    b.ret_void()
    return b.function


RULE = Rule(make_blocks_whole, BLOCK, ((4, 1), (2, 1), (1, 4)), _add)
