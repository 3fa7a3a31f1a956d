"""The kernels of this process: plain functions over tensors.

Every result's bits are those of docs/sums.md, whatever the target, the other rows of a batch, the
thread that calls and the number of threads that share the work.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from blyan_node.moe.kernels import compiler, objects
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import Target, runnable

_PLACE, _COUNT = ctypes.c_void_p, ctypes.c_int64
_LINEAR = (_PLACE, _PLACE, _COUNT, _COUNT, _PLACE, _COUNT, _COUNT, _COUNT)


class Kernels:
    """The kernels of one target. Every function may be called from several threads at once."""

    def __init__(self, target: Target, machine_code: bytes) -> None:
        self.target = target
        self._code = compiler.Code(target, machine_code)
        self._linear = {
            name: self._code.function(f"call_linear_{name}", _LINEAR) for name in STORAGES
        }

    def linear(
        self,
        x: Tensor,
        matrix: Matrix,
        out: Tensor | None = None,
        span: tuple[int, int] | None = None,
    ) -> Tensor:
        """x [n, depth] times the matrix, transposed: float32 [n, outs], or its columns of `span`.

        `out` takes the result: float32 [n, outs], rows of any stride. Columns outside of `span`
        are left as they are.
        """
        if out is None:
            out = torch.empty(x.shape[0], matrix.outs)
        first, last = span or (0, matrix.outs)
        rows = x.shape[0]
        assert x.dtype == out.dtype == torch.float32
        assert x.shape == (rows, matrix.depth) and out.shape == (rows, matrix.outs)
        assert x.stride(1) == 1 and out.stride(1) == 1 and 0 <= first <= last <= matrix.outs
        self._linear[matrix.storage.name](
            matrix.place, x.data_ptr(), 4 * x.stride(0), rows,
            out.data_ptr(), 4 * out.stride(0), first, last,
        )  # fmt: skip
        return out


def load(folder: Path | None = None, target: Target | None = None) -> Kernels:
    """The kernels for `target`, by default the best for this machine.

    Their machine code is kept in `folder` if one is given. Raises `Unsupported` where the processor
    has no fused multiply-add.
    """
    target = target or runnable()[0]
    return Kernels(target, objects.machine_code(target, folder, compiler.compile_object))
