"""How weights lie in memory, and how 32 of them become float32 in registers.

Every storage gives its weights in the order of their index, so that the bits of a product are those
of the same values in any other storage. What a byte stands for is exact; only FP8 is taken at 1/256
of its value, which the end of a product makes good (`Storage.unit`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, HALF, I8, I16, I32, I64, constant, vector

# Part p of a block: a register with its weights p * lanes, p * lanes + 1, …
Parts = Callable[[int], ir.Value]


@dataclass(frozen=True)
class Grid:
    """Scales of `size` bytes, each for `outs` by `depth` weights (powers of two; depth >= 32)."""

    outs: int
    depth: int
    size: int

    def shape(self, outs: int, depth: int) -> tuple[int, int]:
        """How many scales a matrix has, by rows and by columns."""
        return -(-outs // self.outs), -(-depth // self.depth)


@dataclass(frozen=True)
class Stream:
    """That a single row's outputs are read one after another, up to a `depth`.

    A processor foresees one stream best. What it does not foresee of long ones is asked for
    `ahead` bytes before it is read.
    """

    depth: int
    ahead: int = 0


@dataclass(frozen=True)
class Storage:
    """`bits` of a weight, and `read(b, block, scale, lanes)`: the parts of the block of 32 there.

    `scale` points to the block's scale in a storage that has a `grid` of them. `effort` is 0
    for weights that need no work to become float32, 1 for little and 2 for much. Those of
    checkpoints are also read `by_columns`. `alone` is a faster form for one row, where a register
    has 8 lanes: it gives sixteen weights not by index but in the order `deal`.
    Weights are asked for while those `ahead` bytes before them are read: measured, with one row of
    each. Of `streams` a single row takes the first that is long enough.
    """

    name: str
    bits: int
    read: Callable[[ir.IRBuilder, ir.Value, ir.Value, int], Parts]
    effort: int
    unit: float = 1.0
    grid: Grid | None = None
    by_columns: bool = False
    alone: "Storage | None" = None
    deal: Sequence[int] = ()
    ahead: int = 16 * 1024
    streams: Sequence[Stream] = ()

    def bytes(self, weights: int) -> int:
        """The length of so many weights."""
        return -(-weights * self.bits // 8)

    def scale_at(self, b: ir.IRBuilder, scale: ir.Value, k: ir.Value) -> ir.Value:
        """The address of the scale of the weights from `k` on, in blocks whose first is `scale`."""
        if self.grid is None:
            return scale
        number = b.lshr(k, emit.word(self.grid.depth.bit_length() - 1))
        return emit.at(b, scale, b.mul(number, emit.word(self.grid.size)))


def _float32(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    return lambda part: emit.load(b, vector(FLOAT, lanes), block, 4 * lanes * part)


def _bfloat16(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    def part(number: int) -> ir.Value:
        raw = emit.load(b, vector(I16, lanes), block, 2 * lanes * number)
        wide = b.zext(raw, vector(I32, lanes))
        return b.bitcast(b.shl(wide, constant(wide.type, 16)), vector(FLOAT, lanes))

    return part


def _float16(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    def part(number: int) -> ir.Value:
        raw = emit.load(b, vector(HALF, lanes), block, 2 * lanes * number)
        return b.fpext(raw, vector(FLOAT, lanes))

    return part


def _int8(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    def part(number: int) -> ir.Value:
        raw = emit.load(b, vector(I8, lanes), block, lanes * number)
        return b.sitofp(b.sext(raw, vector(I32, lanes)), vector(FLOAT, lanes))

    return part


def _fp8(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    """E4M3 without infinities: moved by seven bits it is the float16 of 1/256 of its value.

    The two codes with all bits below the sign are NaN; they would be 480.
    """
    kind = vector(I16, 16)

    @cache
    def sixteen(number: int) -> ir.Value:
        raw = b.sext(emit.load(b, vector(I8, 16), block, 16 * number), kind)
        low = b.and_(raw, constant(kind, 0x7F))
        nan = b.icmp_signed("==", low, constant(kind, 0x7F))
        moved = b.shl(raw, constant(kind, 7))
        bits = b.and_(moved, constant(kind, 0xBFFF))
        return b.bitcast(b.or_(bits, b.sext(nan, kind)), vector(HALF, 16))

    def part(number: int) -> ir.Value:
        whole, first = divmod(lanes * number, 16)
        halves = sixteen(whole)
        mine = emit.pick(b, halves, halves, range(first, first + lanes))
        return b.fpext(mine, vector(FLOAT, lanes))

    return part


def _fp8_blocks(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    """E4M3 numbers times the float32 scale of their block, rounded once.

    The scale is taken 256 times: what the number is short of. That is exact, as it is bounded.
    """
    numbers = _fp8(b, block, scale, lanes)
    whole = b.fmul(emit.load(b, FLOAT, scale), constant(FLOAT, 256.0))
    factor = emit.broadcast(b, whole, lanes)
    return lambda part: b.fmul(numbers(part), factor)


# The upper byte of the float16 of each MXFP4 code; the lower byte is zero.
_E2M1 = [0x00, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46]
_E2M1 += [0x80 | byte for byte in _E2M1]


def _mxfp4(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    """E2M1 codes, two in a byte, times the power of two of their block."""
    if lanes == len(_E2M1_VALUES):
        return _mxfp4_in_lanes(b, block, scale)
    kind = vector(I8, 16)
    raw = emit.load(b, kind, block)
    even = b.and_(raw, constant(kind, 0x0F))
    odd = b.lshr(raw, constant(kind, 4))
    zero, table = constant(kind, 0), ir.Constant(kind, _E2M1)
    power = _power(b, scale, lanes)

    @cache
    def sixteen(number: int) -> ir.Value:
        order = [lane // 2 + 16 * (lane % 2) for lane in range(16 * number, 16 * number + 16)]
        codes = emit.pick(b, even, odd, order)
        return emit.intrinsic(b, "llvm.x86.ssse3.pshuf.b.128", kind, [table, codes])

    def part(number: int) -> ir.Value:
        whole, first = divmod(lanes * number, 16)
        order = [lane for i in range(first, first + lanes) for lane in (0, 16 + i)]
        bits = emit.pick(b, zero, sixteen(whole), order)
        halves = b.bitcast(bits, vector(HALF, lanes))
        return b.fmul(b.fpext(halves, vector(FLOAT, lanes)), power)

    return part


_E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_E2M1_VALUES += [-value for value in _E2M1_VALUES]


def _mxfp4_in_lanes(b: ir.IRBuilder, block: ir.Value, scale: ir.Value) -> Parts:
    """The same where a register has a lane for every code: what it stands for is looked up there.

    Eight codes are 32 bits. All have a copy of them, with its own code moved to the lowest four,
    and the lookup heeds no others.
    """
    lanes = len(_E2M1_VALUES)
    kind, bits = vector(FLOAT, lanes), vector(I32, lanes)
    values = b.fmul(ir.Constant(kind, _E2M1_VALUES), _power(b, scale, lanes))

    def part(number: int) -> ir.Value:
        eights = emit.load(b, vector(I32, 2), block, 8 * number)
        copies = emit.pick(b, eights, eights, [0] * 8 + [1] * 8)
        codes = b.lshr(copies, ir.Constant(bits, [*range(0, 32, 4)] * 2))
        return emit.intrinsic(b, "llvm.x86.avx512.permvar.sf.512", kind, [values, codes])

    return part


# The upper and lower bytes of the upper half of the float32 of each MXFP4 code.
_E2M1_UPPER = [0x00, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40]
_E2M1_UPPER += [0x80 | byte for byte in _E2M1_UPPER]
_E2M1_LOWER = [0x00, 0x00, 0x80, 0xC0, 0x00, 0x40, 0x80, 0xC0] * 2


def _mxfp4_dealt(b: ir.IRBuilder, block: ir.Value, scale: ir.Value, lanes: int) -> Parts:
    """All 32 codes in one register of bytes, which is looked up twice: the two bytes of bfloat16.

    The lower half of the register has the even weights and the upper half the odd ones, since bytes
    move within halves alone.
    """
    assert lanes == 8
    kind = vector(I8, 32)
    raw = emit.load(b, vector(I8, 16), block)
    both = b.bitcast(emit.pick(b, raw, raw, [*range(16), *range(16)]), vector(I64, 4))
    moved = b.lshr(both, ir.Constant(both.type, [0, 0, 4, 4]))
    codes = b.and_(b.bitcast(moved, kind), constant(kind, 0x0F))
    lookup = partial(emit.intrinsic, b, "llvm.x86.avx2.pshuf.b", kind)
    lower, upper = (
        lookup([ir.Constant(kind, table * 2), codes]) for table in (_E2M1_LOWER, _E2M1_UPPER)
    )
    power = _power(b, scale, lanes)

    @cache
    def sixteen(number: int) -> ir.Value:
        places = [16 * half + 8 * number + byte for half in (0, 1) for byte in range(8)]
        pairs = [at for place in places for at in (place, 32 + place)]
        return b.bitcast(emit.pick(b, lower, upper, pairs), vector(I32, lanes))

    def part(number: int) -> ir.Value:
        whole, second = divmod(number, 2)
        pairs = sixteen(whole)
        bits = b.and_(pairs, constant(pairs.type, -1 << 16)) if second else _upper(b, pairs)
        return b.fmul(b.bitcast(bits, vector(FLOAT, lanes)), power)

    return part


def _upper(b: ir.IRBuilder, pairs: ir.Value) -> ir.Value:
    """Of each 32 bits the lower half, as the upper one."""
    return b.shl(pairs, constant(pairs.type, 16))


def _power(b: ir.IRBuilder, scale: ir.Value, lanes: int) -> ir.Value:
    """The power of two of a block, in every lane: looked up, of all that there are."""
    place = b.gep(_powers(b.module), [b.zext(emit.load(b, I8, scale), I64)], source_etype=FLOAT)
    return emit.broadcast(b, emit.load(b, FLOAT, place), lanes)


def _powers(module: ir.Module) -> ir.Value:
    """The address of what each E8M0 byte stands for, as in `powers_of_two`."""
    name = "powers_of_two"
    if name not in module.globals:
        bits = [max(byte << 23, 1 << 22) for byte in range(255)] + [0x7FC00000]
        table = ir.GlobalVariable(module, ir.ArrayType(I32, len(bits)), name)
        table.initializer = ir.Constant(table.value_type, bits)
        table.linkage, table.global_constant = "internal", True
    return module.globals[name]


def powers_of_two(b: ir.IRBuilder, scales: ir.Value) -> ir.Value:
    """The float32 2^(byte - 127) of each E8M0 byte: 0 gives a denormal, 255 is NaN."""
    kind, lanes = vector(FLOAT, scales.type.count), scales.type.count
    wide = vector(I32, lanes)
    bits, least = b.shl(b.zext(scales, wide), constant(wide, 23)), constant(wide, 1 << 22)
    bits = emit.intrinsic(b, f"llvm.umax.v{lanes}i32", wide, [bits, least])
    powers = b.bitcast(bits, kind)
    return b.fadd(powers, b.fsub(powers, powers))  # 0, and NaN of infinity


_MXFP4_ALONE = Storage(
    "mxfp4_alone", 4, _mxfp4_dealt, 2, grid=Grid(1, 32, 1),
    deal=(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15),
)  # fmt: skip

# Measured. Deeper float32 rows do not stay in the first-level cache from one output to the next.
_WIDE_STREAMS = (Stream(3072),)
_HALF_STREAMS = Stream(2048), Stream(1 << 62, ahead=16 * 1024)

STORAGES = {
    storage.name: storage
    for storage in (
        Storage("float32", 32, _float32, 0, by_columns=True, streams=_WIDE_STREAMS),
        Storage("bfloat16", 16, _bfloat16, 1, by_columns=True, streams=_HALF_STREAMS),
        Storage("float16", 16, _float16, 1, by_columns=True, streams=_HALF_STREAMS),
        Storage("int8", 8, _int8, 1),
        Storage("fp8", 8, _fp8, 2, unit=256.0),
        Storage("fp8_blocks", 8, _fp8_blocks, 2, grid=Grid(128, 128, 4)),
        Storage("mxfp4", 4, _mxfp4, 2, grid=Grid(1, 32, 1), alone=_MXFP4_ALONE),
        Storage("mxfp4_whole", 4, _mxfp4, 2, grid=Grid(1, 32, 1)),
    )
}
