"""The reference of docs/sums.md for whole arrays: slow, exact, and without any kernel.

`broken` changes one rule, so that a test can show that it would notice.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
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
    while (half := sums.shape[2] // 2) > 0:
        with np.errstate(all="ignore"):
            if broken == "tree":
                sums = sums[:, :, ::2] + sums[:, :, 1::2]
            else:
                sums = sums[:, :, :half] + sums[:, :, half:]
    return sums[:, :, 0]


def products(
    x: Floats,
    w: Floats,
    *,
    unit: float = 1.0,
    scales: Floats | None = None,
    biases: Floats | None = None,
    broken: Broken | None = None,
) -> Floats:
    """What `Kernels.linear` gives for weights of the values w [outs, depth]."""
    with np.errstate(all="ignore"):
        y = dots(x, w, broken) * np.float32(unit)
        y = y * (np.float32(1) if scales is None else scales)
        y = y + (np.float32(-0.0) if biases is None else biases)
    y[np.isnan(y)] = np.float32("nan")
    return y
