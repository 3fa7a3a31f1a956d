"""Rows of float32 as whole numbers of 16 bits times a power of two (docs/sums.md)."""

from llvmlite import ir

from blyan_node.moe.kernels import emit
from blyan_node.moe.kernels.emit import FLOAT, I16, I32, I64, POINTER, constant, vector
from blyan_node.moe.kernels.order import BLOCK
from blyan_node.moe.kernels.padding import padded

_BIAS, _MANTISSA, _MOST_BITS = 127, 23, 14  # the largest value becomes 2^14 or more
_LEAST, _GREATEST = (_BIAS - 100) << _MANTISSA, (_BIAS + 100) << _MANTISSA  # 2^-100, 2^100


def make_whole(module: ir.Module) -> ir.Function:
    """numbers · power = x, rounded: int16 [count], zeros after them up to a whole block.

    If there is no such power `bad` is set, and nothing else.
    """
    places = (
        ("numbers", POINTER), ("power", POINTER), ("x", POINTER), ("count", I64), ("bad", POINTER),
    )  # fmt: skip
    b, (numbers, power, x, count, bad) = emit.define(module, "make_whole", places)
    bits, floats = vector(I32, 8), vector(FLOAT, 8)
    most, done = emit.slot(b, bits, constant(bits, 0)), emit.slot(b, I64, emit.word(0))

    def compare(place: ir.Value) -> None:
        """Sizes are in the order of their bits, and what is not finite is above all others."""
        size, known = (
            b.and_(emit.load(b, bits, place), constant(bits, 0x7FFFFFFF)),
            b.load(most, typ=bits),
        )
        b.store(b.select(b.icmp_signed(">", size, known), size, known), most)

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
    down = b.sub(constant(I32, 2 * _BIAS + _MOST_BITS), exponent)
    inverse = emit.broadcast(b, _power(b, down), 8)
    emit.store(b, _power(b, b.sub(exponent, constant(I32, _MOST_BITS))), power)

    def convert(place: ir.Value, at: ir.Value) -> None:
        scaled = b.fmul(emit.load(b, floats, place), inverse)
        near = emit.intrinsic(b, "llvm.x86.avx.cvt.ps2dq.256", bits, [scaled])
        top = constant(bits, 32767)
        near = b.select(b.icmp_signed("<", near, top), near, top)
        emit.store(b, b.trunc(near, vector(I16, 8)), numbers, b.shl(at, emit.word(1)))

    with emit.counting(b, count, 8) as index:
        convert(emit.at(b, x, b.shl(index, emit.word(2))), index)
    for part in range(0, BLOCK, 8):
        convert(emit.at(b, rest, 4 * part), b.add(whole, emit.word(part)))
    b.ret_void()
    return b.function


def _largest(b: ir.IRBuilder, lanes: ir.Value) -> ir.Value:
    found = b.extract_element(lanes, constant(I32, 0))
    for lane in range(1, lanes.type.count):
        value = b.extract_element(lanes, constant(I32, lane))
        found = b.select(b.icmp_signed(">", value, found), value, found)
    return found


def _power(b: ir.IRBuilder, exponent: ir.Value) -> ir.Value:
    """The power of two with these bits of an exponent."""
    return b.bitcast(b.shl(exponent, constant(I32, _MANTISSA)), FLOAT)
