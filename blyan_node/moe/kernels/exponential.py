"""e^x by arithmetic that every processor rounds alike; docs/sums.md has the same in plain Python.

x is cut into n · ln 2 + r, e^r is a polynomial of r (Cephes' expf, S. L. Moshier), and 2^n is
multiplied in as two halves so that denormal results and infinity come out right. The error stays
below 1.2 units in the last place (a test measures a million values).
"""

from llvmlite import ir

from blyan_node.moe.kernels.emit import FLOAT, I32, constant, fma, vector

LOWEST, HIGHEST = -104.0, 89.0  # beyond these the result is 0 or infinity
LOG2_E = 1.44269504
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
POLYNOMIAL = (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3,
    4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
)  # fmt: skip
_ROUNDER = 12582912.0  # 1.5 · 2^23: adding it leaves the nearest integer in the low bits
_ROUNDER_BITS = 0x4B400000


def exp(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """e^x in each lane; NaN stays NaN."""
    kind = x.type
    x = at_most(b, x, HIGHEST)
    x = at_least(b, x, LOWEST)
    shifted = fma(b, x, constant(kind, LOG2_E), constant(kind, _ROUNDER))
    n = b.fsub(shifted, constant(kind, _ROUNDER))
    r = fma(b, n, constant(kind, -LN2_HIGH), x)
    r = fma(b, n, constant(kind, -LN2_LOW), r)
    p = constant(kind, POLYNOMIAL[0])
    for coefficient in POLYNOMIAL[1:]:
        p = fma(b, p, r, constant(kind, coefficient))
    p = b.fadd(fma(b, p, b.fmul(r, r), r), constant(kind, 1.0))
    whole = vector(I32, kind.count)
    power = b.sub(b.bitcast(shifted, whole), constant(whole, _ROUNDER_BITS))
    half = b.ashr(power, constant(whole, 1))
    return b.fmul(b.fmul(p, _two_to(b, half)), _two_to(b, b.sub(power, half)))


def at_most(b: ir.IRBuilder, x: ir.Value, bound: float | ir.Value) -> ir.Value:
    """The smaller of x and `bound`; NaN stays."""
    limit = constant(x.type, bound) if isinstance(bound, float) else bound
    return b.select(b.fcmp_ordered(">", x, limit), limit, x)


def at_least(b: ir.IRBuilder, x: ir.Value, bound: float | ir.Value) -> ir.Value:
    """The larger of x and `bound`; NaN stays."""
    limit = constant(x.type, bound) if isinstance(bound, float) else bound
    return b.select(b.fcmp_ordered("<", x, limit), limit, x)


def sigmoid_of_product(b: ir.IRBuilder, top: ir.Value, x: ir.Value) -> ir.Value:
    """top / (1 + e^-x): with top = 1 the sigmoid of x, with top = x its SiLU."""
    return b.fdiv(top, b.fadd(exp(b, b.fneg(x)), constant(x.type, 1.0)))


def _two_to(b: ir.IRBuilder, power: ir.Value) -> ir.Value:
    biased = b.add(power, constant(power.type, 127))
    bits = b.shl(biased, constant(power.type, 23))
    return b.bitcast(bits, vector(FLOAT, power.type.count))
