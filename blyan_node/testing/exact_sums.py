"""The reference of docs/sums.md for whole arrays: slow, exact, and without any kernel.

`broken` changes one rule, so that a test can show that it would notice.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Broken = Literal["order", "tree", "padding", "fused", "partial sums"]


def fma(x: Floats, y: Floats, z: Floats) -> Floats:
    """x · y + z, rounded once.

    The product is exact in float64. Its sum with z is rounded to odd there, which keeps what the
    second rounding needs (Boldo and Melquiond, 2008).
    """
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y
        total = product + z
        virtual = total - product
        error = (product - (total - virtual)) + (z - virtual)
        even = total.view(np.int64) & 1 == 0
        inexact = np.isfinite(total) & (error != 0) & even
        total = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
        return total.astype(np.float32)


def dots(x: Floats, w: Floats, broken: Broken | None = None) -> Floats:
    """x [rows, depth] times w [outs, depth] transposed: float32 [rows, outs]."""
    lanes = 8 if broken == "partial sums" else 16
    padding = ((0, 0), (0, -x.shape[1] % 32))
    x = np.pad(x, padding, constant_values=1 if broken == "padding" else 0)
    w = np.pad(w, padding, constant_values=1 if broken == "padding" else 0)
    sums = np.zeros((x.shape[0], w.shape[0], lanes), np.float32)
    starts = range(0, x.shape[1], lanes)
    for k in reversed(starts) if broken == "order" else starts:
        left, right = x[:, None, k : k + lanes], w[None, :, k : k + lanes]
        with np.errstate(all="ignore"):
            fused = broken != "fused"
            sums = fma(left, right, sums) if fused else sums + left * right
    return _added_up(sums, broken)


def _added_up(sums: Floats, broken: Broken | None = None) -> Floats:
    """Partial sums [..., lanes] as one."""
    while (half := sums.shape[-1] // 2) > 0:
        with np.errstate(all="ignore"):
            if broken == "tree":
                sums = sums[..., ::2] + sums[..., 1::2]
            else:
                sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def whole_dots(x: Floats, w: Floats) -> Floats:
    """The same for weights that are whole numbers of 8 bits."""
    rows = []
    for row in x:
        largest = np.abs(row).max()
        if not 2.0**-100 <= largest <= 2.0**100 or row.size > 1 << 16:
            rows.append(dots(row[None], w)[0])
            continue
        power = np.float32(2.0) ** (int(np.frexp(largest)[1]) - 15)
        numbers = np.minimum(np.rint(row / power), 32767).astype(np.int64)
        rows.append((w.astype(np.int64) @ numbers).astype(np.float32) * power)
    return np.stack(rows)


def block_dots(x: Floats, w: Floats, scales: Bytes) -> Floats:
    """The same for weights of MXFP4: numbers w [outs, depth], scales [outs, depth / 32]."""
    with np.errstate(all="ignore"):
        factors = np.ldexp(1.0, scales.astype(int) - 127).astype(np.float32)
        factors[scales == 255] = np.float32("nan")
        values = w * factors.repeat(32, 1)
    rows = []
    for row in x:
        if not (np.abs(row) <= 2.0**20).all() or row.size > 1 << 16:
            rows.append(dots(row[None], values)[0])
            continue
        blocks = row.astype(np.float64).reshape(-1, 32)
        largest = np.maximum(np.abs(blocks).max(1), 2.0**-100)
        powers = np.ldexp(1.0, np.frexp(largest)[1] - 15)
        numbers = np.minimum(np.rint(blocks / powers[:, None]), 32767).astype(np.int64)
        eights = (numbers.reshape(-1) * (512 * w).astype(np.int64)).reshape(w.shape[0], -1, 8)
        totals = eights.sum(2).astype(np.float32)
        with np.errstate(all="ignore"):
            units = (factors * (powers / 512).astype(np.float32)).repeat(4, 1)
            sums = np.zeros((w.shape[0], 16), np.float32)
            for first in range(0, totals.shape[1], 16):
                some = slice(first, min(first + 16, totals.shape[1]))
                here = slice(0, some.stop - first)
                sums[:, here] = fma(totals[:, some], units[:, some], sums[:, here])
        rows.append(_added_up(sums))
    return np.stack(rows)


def products(
    x: Floats,
    w: Floats,
    *,
    whole: bool = False,
    block_scales: Bytes | None = None,
    unit: float = 1.0,
    scales: Floats | None = None,
    biases: Floats | None = None,
    broken: Broken | None = None,
) -> Floats:
    """x times w transposed, scaled, for weights of the values w [outs, depth].

    `whole` are those that are stored as whole numbers. With `block_scales` it is MXFP4, and w are
    the numbers without them.
    """
    if block_scales is not None:
        y = block_dots(x, w, block_scales)
    else:
        y = whole_dots(x, w) if whole else dots(x, w, broken)
    with np.errstate(all="ignore"):
        y = y * np.float32(unit)
        y = y * (np.float32(1) if scales is None else scales)
        y = y + (np.float32(-0.0) if biases is None else biases)
    return one_nan(y)


def exp(x: Floats) -> Floats:
    """e^x."""

    def f(value: float) -> Floats:
        return np.array(value, np.float32)

    with np.errstate(all="ignore"):
        x = np.clip(x, f(-104), f(89))
        shifted = fma(x, f(1.44269504), f(12582912))
        n = shifted - f(12582912)
        r = fma(n, f(2.12194440e-4), fma(n, f(-0.693359375), x))
        p = f(1.9875691500e-4)
        for coefficient in (
            1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1
        ):  # fmt: skip
            p = fma(p, r, f(coefficient))
        p = fma(p, r * r, r) + f(1)
        whole = np.nan_to_num(n).astype(np.int32)
        half = whole >> 1
        power: Floats = np.ldexp(np.ldexp(p, half), whole - half)
        return power


def sigmoid_of_product(top: Floats | np.float32, x: Floats) -> Floats:
    """top / (1 + e^-x)."""
    with np.errstate(all="ignore"):
        return one_nan(top / (exp(-x) + np.float32(1)))


def swiglu(gate: Floats, up: Floats) -> Floats:
    """SiLU(gate) · up."""
    with np.errstate(all="ignore"):
        return one_nan(sigmoid_of_product(gate, gate) * up)


def gpt_oss(both: Floats, limit: float, alpha: float) -> Floats:
    """gate and up take turns in the rows of `both`."""
    gate = np.minimum(both[:, ::2], np.float32(limit))
    up = np.clip(both[:, 1::2], np.float32(-limit), np.float32(limit))
    with np.errstate(all="ignore"):
        active = sigmoid_of_product(gate, gate * np.float32(alpha))
        return one_nan((up + np.float32(1)) * active)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Rows of x [n, width]."""
    squares = np.concatenate([dots(row[None], row[None])[0] for row in x])
    with np.errstate(all="ignore"):
        mean = squares / np.float32(x.shape[1])
        factor = (1 / np.sqrt(mean + np.float32(eps))).astype(np.float32)
        return one_nan(x * factor[:, None] * weight)


def softmax(x: Floats) -> Floats:
    """Rows of x [n, width]."""
    with np.errstate(all="ignore"):
        largest = np.fmax.reduce(x, axis=1, initial=np.float32("-inf"))
        shares = exp(x - largest[:, None])
        total = dots(shares, np.ones((1, x.shape[1]), np.float32))
        return one_nan(shares / total)


def attend(
    query: Floats, keys: Floats, values: Floats, scale: float, sinks: Floats | None = None
) -> Floats:
    """query [heads, dim], keys [kv heads, seen, dim], values [kv heads, seen, value dim]."""
    group, outs = query.shape[0] // keys.shape[0], []
    for head, row in enumerate(query):
        scores = dots(row[None], keys[head // group]) * np.float32(scale)
        if sinks is not None:
            scores = np.append(scores, sinks[None, head : head + 1], axis=1)
        shares = softmax(scores)[:, : keys.shape[1]]
        outs.append(dots(shares, values[head // group].T.copy()))
    return one_nan(np.concatenate(outs))


def one_nan(x: Floats) -> Floats:
    """x with one bit pattern for all NaNs."""
    return np.where(np.isnan(x), np.float32("nan"), x)
