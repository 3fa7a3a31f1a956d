"""The arithmetic whose every sum has a written order (docs/sums.md), by our own kernels."""

import torch
from torch import Tensor

from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.order import CONTRACT
from blyan_node.moe.stored import Mxfp4, Scaled, Weight

_TILE_FLOATS = 1 << 18  # of a matrix that is stored by columns, turned at a time


class Contract:
    """`blyan_node.moe.arithmetic.Arithmetic`, by the kernels of one target."""

    name = CONTRACT
    aligned_bytes = 1

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.rms_norm = kernels.rms_norm
        self.swiglu = kernels.swiglu
        self.clamped = kernels.gpt_oss
        self.softmax = kernels.softmax
        self.sigmoid = kernels.sigmoid

    def __str__(self) -> str:
        return f"the {self.kernels.target.name} kernels"

    def product(self, weight: Weight, bias: Tensor | None = None) -> "ByRows | ByColumns":
        """A matrix where it lies; only its bias is widened."""
        wide = None if bias is None else bias.float().contiguous()
        if isinstance(weight, Tensor) and not weight.is_contiguous():
            return ByColumns(self.kernels, weight, wide)
        return ByRows(self.kernels, weight, wide)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotary embedding of x [n, heads, dim], row by row by cos and sin [n, dim / 2]."""
        turn = self.kernels.rotate
        rows = [turn(x[r], cos[r], sin[r], interleaved=interleaved) for r in range(x.shape[0])]
        return rows[0][None] if len(rows) == 1 else torch.stack(rows)

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
        n, seen = query.shape[0], keys.shape[1]
        out = torch.empty(n, query.shape[1], values.shape[2])
        for row in range(n):
            last = seen - n + row + 1
            first = 0 if window is None else max(0, last - window)
            here = slice(first, last)
            out[row] = self.kernels.attend(query[row], keys[:, here], values[:, here], scale, sinks)
        return out


class ByRows:
    """A matrix [outs, depth] whose rows lie one after another."""

    def __init__(self, kernels: Kernels, weight: Weight, bias: Tensor | None) -> None:
        self._kernels = kernels
        if isinstance(weight, Mxfp4):
            blocks, scales = weight.blocks, weight.scales
            self._matrix = Matrix("mxfp4", weight.shape, blocks, block_scales=scales, biases=bias)
        elif isinstance(weight, Scaled):
            self._matrix = Matrix.of(weight.codes, scales=weight.scales, biases=bias)
        else:
            self._matrix = Matrix.of(weight, biases=bias)
        self.outs = self._matrix.outs

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias."""
        return self._kernels.linear(x, self._matrix)


class ByColumns:
    """A matrix [outs, depth] that is stored as [depth, outs]."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        self._kernels, self._weight, self._bias = kernels, weight, bias
        self.outs = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias."""
        out = torch.empty(x.shape[0], self.outs)
        step = max(1, _TILE_FLOATS // max(1, x.shape[1]))
        for first in range(0, self.outs, step):
            here = slice(first, first + step)
            bias = None if self._bias is None else self._bias[here]
            tile = Matrix.of(self._weight[here].contiguous(), biases=bias)
            self._kernels.linear(x, tile, out[:, here])
        return out
