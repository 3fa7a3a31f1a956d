"""Rows of float32 as whole numbers of 16 bits times a power of two (docs/sums.md)."""

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I16, I32, I64, POINTER, constant, vector
from blyan_node.moe.kernels.order import BLOCK
from blyan_node.moe.kernels.padding import padded

_BIAS, _MANTISSA, _MOST_BITS = 127, 23, 14  # the largest value becomes 2^14 or more
_LEAST, _GREATEST = (_BIAS - 100) << _MANTISSA, (_BIAS + 100) << _MANTISSA  # 2^-100, 2^100
_MOST_OF_BLOCKS = (_BIAS + 20) << _MANTISSA  # 2^20: a power times the greatest scale is finite
_CODE_BITS = 9  # MXFP4 codes are taken 512 times

_PLACES = (
    ("numbers", POINTER), ("powers", POINTER), ("x", POINTER), ("count", I64), ("bad", POINTER),
)  # fmt: skip


def make_whole(module: ir.Module) -> ir.Function:
    """numbers · power = x, rounded: int16 [count], zeros after them up to a whole block.

    If there is no such power `bad` is set, and nothing else.
    """
    b, (numbers, power, x, count, bad) = emit.define(module, "make_whole", _PLACES)
    bits, floats = vector(I32, 8), vector(FLOAT, 8)
    most, done = emit.slot(b, bits, constant(bits, 0)), emit.slot(b, I64, emit.word(0))

    def compare(place: ir.Value) -> None:
        b.store(_larger(b, _size(b, place), b.load(most, typ=bits)), most)

    with emit.steps(b, done, count, 8) as index:
        compare(emit.at(b, x, b.shl(index, emit.word(2))))
    whole = b.load(done, typ=I64)
    rest = padded(b, emit.at(b, x, b.shl(whole, emit.word(2))), b.sub(count, whole), 4)
    compare(rest)  # fewer than eight, and zeros
    largest = _largest(b, b.load(most, typ=bits))
    good = b.and_(
        b.icmp_signed(">=", largest, constant(I32, _LEAST)),
        b.icmp_signed("<=", largest, constant(I32, _GREATEST)),
    )
    with b.if_then(b.not_(good), likely=False):
        emit.store(b, emit.word(1), bad)
        b.ret_void()
    exponent = b.lshr(largest, constant(I32, _MANTISSA))
    inverse = _inverse(b, exponent)
    emit.store(b, _power(b, b.sub(exponent, constant(I32, _MOST_BITS))), power)

    def convert(place: ir.Value, at: ir.Value) -> None:
        near = _near(b, emit.load(b, floats, place), inverse)
        emit.store(b, near, numbers, b.shl(at, emit.word(1)))

    with emit.counting(b, count, 8) as index:
        convert(emit.at(b, x, b.shl(index, emit.word(2))), index)
    for part in range(0, BLOCK, 8):
        convert(emit.at(b, rest, 4 * part), b.add(whole, emit.word(part)))
    b.ret_void()
    return b.function


# The numbers of a block of 32, by eights: as the even and the odd bytes of its lower codes of four
# bits come apart, and those of its upper ones (`blockwise`). Two blocks have each eight in turn.
DEALT = [range(first, BLOCK, 4) for first in (0, 2, 1, 3)]


def make_blocks_whole(module: ir.Module) -> ir.Function:
    """numbers · 512 · powers = x, rounded: of each 32 values int16, `DEALT`, and a power.

    `count` is a multiple of 32. If a value is too large or not finite `bad` is set.
    """
    b, (numbers, powers, x, count, bad) = emit.define(module, "make_blocks_whole", _PLACES)
    bits, floats, parts = vector(I32, 8), vector(FLOAT, 8), range(BLOCK // 8)
    most = emit.slot(b, I32, constant(I32, 0))
    with emit.counting(b, count, BLOCK) as index:
        at = b.shl(index, emit.word(2))
        block = emit.at(b, x, at)
        sizes = constant(bits, 0)
        for part in parts:
            sizes = _larger(b, _size(b, emit.at(b, block, 32 * part)), sizes)
        largest = _largest(b, sizes)
        b.store(_larger(b, largest, b.load(most, typ=I32)), most)
        exponent = b.lshr(_larger(b, largest, constant(I32, _LEAST)), constant(I32, _MANTISSA))
        inverse = _inverse(b, exponent)
        n0, n1, n2, n3 = (_near(b, emit.load(b, floats, block, 32 * n), inverse) for n in parts)
        low, high = emit.pick(b, n0, n1, range(16)), emit.pick(b, n2, n3, range(16))
        second = b.and_(index, emit.word(BLOCK))
        first = b.sub(index, second)
        start = emit.at(b, numbers, b.add(b.shl(first, emit.word(1)), b.lshr(second, emit.word(1))))
        for number, eight in enumerate(DEALT):
            emit.store(b, emit.pick(b, low, high, eight), start, BLOCK * number)
        power = _power(b, b.sub(exponent, constant(I32, _MOST_BITS + _CODE_BITS)))
        emit.store(b, power, powers, b.lshr(index, emit.word(3)))
    too_large = b.icmp_signed(">", b.load(most, typ=I32), constant(I32, _MOST_OF_BLOCKS))
    with b.if_then(too_large, likely=False):
        emit.store(b, emit.word(1), bad)
    b.ret_void()
    return b.function


def _size(b: ir.IRBuilder, place: ir.Value) -> ir.Value:
    """Eight sizes as whole numbers, in the order of which what is not finite is above others."""
    kind = vector(I32, 8)
    return b.and_(emit.load(b, kind, place), constant(kind, 0x7FFFFFFF))


def _larger(b: ir.IRBuilder, one: ir.Value, other: ir.Value) -> ir.Value:
    return b.select(b.icmp_signed(">", one, other), one, other)


def _inverse(b: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    """What values are times, the largest of which has these bits of an exponent: float32 [8]."""
    down = b.sub(constant(I32, 2 * _BIAS + _MOST_BITS), exponent)
    return emit.broadcast(b, _power(b, down), 8)


def _near(b: ir.IRBuilder, values: ir.Value, inverse: ir.Value) -> ir.Value:
    """The nearest whole numbers: int16 [8]."""
    kind = vector(I32, 8)
    near = emit.intrinsic(b, "llvm.x86.avx.cvt.ps2dq.256", kind, [b.fmul(values, inverse)])
    top = constant(kind, 32767)
    return b.trunc(b.select(b.icmp_signed("<", near, top), near, top), vector(I16, 8))


def _largest(b: ir.IRBuilder, lanes: ir.Value) -> ir.Value:
    found = b.extract_element(lanes, constant(I32, 0))
    for lane in range(1, lanes.type.count):
        found = _larger(b, b.extract_element(lanes, constant(I32, lane)), found)
    return found


def _power(b: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    """The power of two with these bits of an exponent."""
    return b.bitcast(b.shl(exponent, constant(I32, _MANTISSA)), FLOAT)
