"""The arithmetic of docs/sums.md without any kernel: what whole models are held against."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blyan_node.moe.kernels.order import CONTRACT
from blyan_node.moe.numerics import Rows
from blyan_node.moe.stored import Mxfp4, Scaled, Weight, widened
from blyan_node.testing import exact_sums
from blyan_node.testing.exact_sums import Floats


def _array(x: Tensor) -> Floats:
    return x.float().numpy()


class Exact:
    """`blyan_node.moe.arithmetic.Arithmetic`, slowly."""

    name = CONTRACT
    aligned_bytes = 1
    device = recorded_by = None

    def product(self, weight: Weight, bias: Tensor | None = None) -> "ExactProduct":
        """A matrix and its bias."""
        return ExactProduct(weight, bias)

    def steps(self, function: Rows) -> Rows:
        """The function itself."""
        return function

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return x + y

    def combine(self, residual: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """residual [n, h] plus rows [n, k, h] by weights [n, k], in the order of k."""
        total = weights[:, 0, None] * rows[:, 0]
        for rank in range(1, weights.shape[1]):
            total = total + weights[:, rank, None] * rows[:, rank]
        return residual + total

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm of each row of x [n, width]."""
        return torch.from_numpy(exact_sums.rms_norm(_array(x), _array(weight), eps))

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return torch.from_numpy(exact_sums.swiglu(_array(gate), _array(up)))

    def clamped(self, both: Tensor, limit: float, alpha: float) -> Tensor:
        """(up + 1) * gate * sigmoid(alpha * gate), clamped, of [n, 2 * width] in turn."""
        return torch.from_numpy(exact_sums.gpt_oss(_array(both), limit, alpha))

    def softmax(self, x: Tensor) -> Tensor:
        """The softmax of each row of x [n, width]."""
        return torch.from_numpy(exact_sums.softmax(_array(x)))

    def sigmoid(self, x: Tensor) -> Tensor:
        """1 / (1 + e^-x)."""
        return torch.from_numpy(exact_sums.sigmoid_of_product(np.float32(1), _array(x)))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotary embedding of x [n, heads, dim], row by row by cos and sin [n, dim / 2]."""
        half = x.shape[2] // 2
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), dim=2)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of the last n positions: query [n, heads, dim] → [n, heads, value dim]."""
        n, seen, rows = query.shape[0], keys.shape[1], []
        for row in range(n):
            last = seen - n + row + 1
            here = slice(0 if window is None else max(0, last - window), last)
            past = _array(keys[:, here]), _array(values[:, here])
            given = None if sinks is None else _array(sinks)
            rows.append(exact_sums.attend(_array(query[row]), *past, scale, given))
        return torch.from_numpy(np.stack(rows))


class ExactProduct:
    """A matrix in float32 values, or its numbers and scales, and its bias."""

    def __init__(self, weight: Weight, bias: Tensor | None) -> None:
        self._rule: dict[str, Any] = {}
        if isinstance(weight, Mxfp4) and weight.whole_rows:
            values = widened(Mxfp4(weight.blocks, torch.full_like(weight.scales, 127)))
            self._rule["block_scales"] = weight.scales.contiguous().numpy()
        elif isinstance(weight, Scaled):
            values = weight.codes.float()
            self._rule |= {
                "scales": _array(weight.scales),
                "whole": weight.codes.dtype == torch.int8,
            }
        else:
            values = widened(weight)
        self._values = values.contiguous().numpy()
        self._biases = None if bias is None else _array(bias)
        self.outs = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias: float32 [n, outs]."""
        found = exact_sums.products(_array(x), self._values, biases=self._biases, **self._rule)
        return torch.from_numpy(found)
