"""The arithmetic whose every sum has a written order (docs/sums.md), by our own kernels."""

import torch
from torch import Tensor

from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.order import CONTRACT
from blyan_node.moe.kernels.recording import Recording, Rows
from blyan_node.moe.stored import Fp8Blocks, Mxfp4, Scaled, Weight

# A matrix that is stored by columns is turned, so many outputs at a time, for that many rows.
_TURNED_ROWS, _TURNED_OUTS = 12, 128


class Contract:
    """`blyan_node.moe.arithmetic.Arithmetic`, by the kernels of one target."""

    name = CONTRACT
    aligned_bytes = 1
    device = None

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.add = kernels.add
        self.combine = kernels.combine
        self.rms_norm = kernels.rms_norm
        self.swiglu = kernels.swiglu
        self.clamped = kernels.gpt_oss
        self.softmax = kernels.softmax
        self.sigmoid = kernels.sigmoid
        self.rotate = kernels.rotate
        self.attend = kernels.attend

    def __str__(self) -> str:
        return f"the {self.kernels.target.name} kernels"

    @property
    def recorded_by(self) -> Kernels | None:
        """The kernels; None where several threads share each of them."""
        return self.kernels if self.kernels.recorder.alone else None

    def steps(self, function: Rows) -> "Steps":
        """The same function, which calls no Python for one row after the first."""
        return Steps(self.kernels, function)

    def product(self, weight: Weight, bias: Tensor | None = None) -> "ContractProduct":
        """A matrix where it lies; only its bias is widened."""
        return ContractProduct(self.kernels, weight, bias)


class Steps:
    """A function from rows to rows; for one row its kernels are called again and nothing else."""

    def __init__(self, kernels: Kernels, function: Rows) -> None:
        self._recorder, self._function = kernels.recorder, function
        self._recording: Recording | None = None
        self._description: Recording | None = None  # the one that `described` is a part of
        self.described = 0  # where it is, once it was asked for

    def __call__(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """What the function gives."""
        if rows[0].shape[0] != 1:
            return self._function(*rows)
        self._recording, results = self._recorder.played(self._recording, self._function, rows)
        return results

    def describe(self, width: int) -> int:
        """The address of a description of its steps for one row [1, width] (`walking.RECORDED`).

        It is there for as long as this. For the thread that has the recorder's lock.
        """
        if not self.described:
            made = self._recording or self._recorder.dry(self._function, [torch.empty(1, width)])
            self._recording = self._description = made
            self.described = made.described()
        return self.described


class ContractProduct:
    """A matrix where it lies, and its bias."""

    def __init__(self, kernels: Kernels, weight: Weight, bias: Tensor | None) -> None:
        self._kernels, self._weight = kernels, weight
        self._bias = bias = None if bias is None else bias.float().contiguous()
        if isinstance(weight, Mxfp4):
            blocks, scales = weight.blocks, weight.scales
            name = "mxfp4_whole" if weight.whole_rows else "mxfp4"
            self._matrix = Matrix(name, weight.shape, blocks, block_scales=scales, biases=bias)
        elif isinstance(weight, Fp8Blocks):
            codes, scales = weight.codes, weight.scales
            self._matrix = Matrix(
                "fp8_blocks", weight.shape, codes, block_scales=scales, biases=bias
            )
        elif isinstance(weight, Scaled):
            self._matrix = Matrix.of(weight.codes, scales=weight.scales, biases=bias)
        else:
            self._matrix = Matrix.of(weight, biases=bias)
        self.outs = self._matrix.outs

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias."""
        if self._matrix.by_columns and x.shape[0] >= _TURNED_ROWS:
            return self._turned(x)
        return self._kernels.linear(x, self._matrix)

    def _turned(self, x: Tensor) -> Tensor:
        """The same by tiles of the matrix that are turned: faster for many rows."""
        assert isinstance(self._weight, Tensor)
        out = torch.empty(x.shape[0], self.outs)
        for first in range(0, self.outs, _TURNED_OUTS):
            here = slice(first, first + _TURNED_OUTS)
            bias = None if self._bias is None else self._bias[here]
            tile = self._weight.t()[:, here].contiguous()  # torch turns a whole matrix fast
            self._kernels.linear(x, Matrix.of(tile.t().contiguous(), biases=bias), out[:, here])
        return out
