"""The kernels of this process: plain functions over tensors.

Every result's bits are those of docs/sums.md, whatever the target, the other rows of a batch, the
thread that calls and the number of threads that share the work.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from blyan_node.moe.kernels import attention, compiler, objects
from blyan_node.moe.kernels.matrix import Buffer, Matrix, address
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import Target, runnable
from blyan_node.moe.kernels.workers import Workers

# Threads divide columns at multiples of this, so that only the last has a narrower tile.
_COLUMNS_STEP = 12

_PLACE, _COUNT = ctypes.c_void_p, ctypes.c_int64
_NUMBER = ctypes.c_float
# The arguments of `call_linear_STORAGE`, as tile.ARGUMENTS names them.
LINEAR = (_PLACE, _PLACE, _COUNT, _COUNT, _PLACE, _COUNT, _COUNT, _COUNT)

_ROWS = (_PLACE, _COUNT)
_EPILOGUES = {
    "swiglu": (*_ROWS * 3, _COUNT, _COUNT),
    "gpt_oss": (*_ROWS * 2, _COUNT, _COUNT, _NUMBER, _NUMBER),
    "rms_norm": (*_ROWS * 2, _COUNT, _COUNT, _PLACE, _NUMBER),
    "softmax": (*_ROWS * 2, _COUNT, _COUNT),
    "sigmoid": (*_ROWS * 2, _COUNT, _COUNT),
    "rotate_halves": (*_ROWS * 2, _COUNT, _COUNT, _PLACE, _PLACE),
    "rotate_pairs": (*_ROWS * 2, _COUNT, _COUNT, _PLACE, _PLACE),
}


class _Task(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in attention.FIELDS]


class Kernels:
    """The kernels of one target. Every function may be called from several threads at once."""

    def __init__(self, target: Target, machine_code: bytes, threads: int = 1) -> None:
        self.target = target
        self._workers = Workers(threads)
        self._code = compiler.Code(target, machine_code)
        self._linear = {
            name: self._code.function(f"call_linear_{name}", LINEAR) for name in STORAGES
        }
        self._epilogues = {
            name: self._code.function(f"call_{name}", arguments)
            for name, arguments in _EPILOGUES.items()
        }
        self._read = self._code.function("call_read", (_PLACE, _COUNT, _PLACE))
        self._attend = self._code.function("call_attend", (_PLACE, _COUNT, _COUNT))

    def close(self) -> None:
        """Ends the threads that share the work; what is called later runs on the calling one."""
        self._workers.close()

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
        rows, outs, depth = x.shape[0], matrix.outs, matrix.depth
        out = torch.empty(rows, outs) if out is None else out
        begin, end = span or (0, outs)
        assert x.shape == (rows, depth) and out.shape == (rows, outs) and 0 <= begin <= end <= outs
        function, place = self._linear[matrix.storage.name], matrix.place
        (x_at, x_stride), (out_at, out_stride) = _rows(x), _rows(out)

        def part(first: int, last: int) -> None:
            function(place, x_at, x_stride, rows, out_at, out_stride, begin + first, begin + last)

        self._workers.share(part, end - begin, rows * depth * (end - begin), _COLUMNS_STEP)
        return out

    def read(self, buffer: Buffer, length: int) -> int:
        """Reads `length` bytes and does next to nothing: the limit of every product of one row."""
        found = ctypes.c_int64()
        self._read(address(buffer), length, ctypes.addressof(found))
        return found.value

    def swiglu(self, gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
        """SiLU(gate) · up, both [n, width]."""
        out = torch.empty(gate.shape) if out is None else out
        self._epilogues["swiglu"](*_rows(out), *_rows(gate), *_rows(up), *gate.shape)
        return out

    def gpt_oss(
        self, both: Tensor, limit: float, alpha: float, out: Tensor | None = None
    ) -> Tensor:
        """(up + 1) · gate · sigmoid(alpha · gate): both [n, 2 · width] has gate and up in turn.

        gate is clamped to at most `limit`, up to ± `limit`.
        """
        n, width = both.shape[0], both.shape[1] // 2
        out = torch.empty(n, width) if out is None else out
        self._epilogues["gpt_oss"](*_rows(out), *_rows(both), n, width, limit, alpha)
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """x · (1 / √(mean of squares + eps)) · weight, for each row of x [n, width]."""
        assert weight.dtype == torch.float32 and weight.is_contiguous()
        assert weight.shape == x.shape[1:]
        out = torch.empty(x.shape) if out is None else out
        self._epilogues["rms_norm"](*_rows(out), *_rows(x), *x.shape, weight.data_ptr(), eps)
        return out

    def softmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Softmax of each row of x [n, width]; `out` may be `x`."""
        out = torch.empty(x.shape) if out is None else out
        self._epilogues["softmax"](*_rows(out), *_rows(x), *x.shape)
        return out

    def sigmoid(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """1 / (1 + e^-x) of x [n, width]; `out` may be `x`."""
        out = torch.empty(x.shape) if out is None else out
        self._epilogues["sigmoid"](*_rows(out), *_rows(x), *x.shape)
        return out

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
        """Rotary embedding of x [heads, dim] at one position; cos and sin are [dim / 2].

        Pairs are (i, i + dim / 2), or (2i, 2i + 1) if interleaved; the result has them in halves.
        """
        heads, dim = x.shape
        for angles in (cos, sin):
            assert angles.dtype == torch.float32 and angles.is_contiguous()
            assert angles.shape == (dim // 2,) and dim % 2 == 0
        out = torch.empty(heads, dim)
        function = self._epilogues["rotate_pairs" if interleaved else "rotate_halves"]
        function(*_rows(out), *_rows(x), heads, dim // 2, cos.data_ptr(), sin.data_ptr())
        return out

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of one token: query [heads, dim] over keys [kv heads, seen, dim] and values.

        values [kv heads, seen, value dim]; sinks [heads] take part in the softmax and have no
        value. `seen` holds what the token may see and nothing else. Returns [heads, value dim].
        """
        (heads, dim), (kv_heads, seen, value_dim) = query.shape, values.shape
        assert keys.shape == (kv_heads, seen, dim) and heads % kv_heads == 0
        assert keys.stride(2) == values.stride(2) == 1 and seen > 0
        assert keys.dtype == values.dtype == torch.float32
        out, scores = torch.empty(heads, value_dim), torch.empty(heads, seen + 1)
        factor = ctypes.c_float(scale)
        task = _Task(
            *_rows(query), *_rows(out),
            keys.data_ptr(), 4 * keys.stride(0), 4 * keys.stride(1),
            values.data_ptr(), 4 * values.stride(0), 4 * values.stride(1),
            scores.data_ptr(), ctypes.addressof(factor), 0 if sinks is None else sinks.data_ptr(),
            heads // kv_heads, seen, dim, value_dim,
        )  # fmt: skip
        place = ctypes.addressof(task)
        products = 2 * heads * seen * dim
        self._workers.share(lambda *span: self._attend(place, *span), kv_heads, products)
        return out


def _rows(x: Tensor) -> tuple[int, int]:
    """The address of float32 rows, and the bytes from one to the next."""
    assert x.dtype == torch.float32 and x.dim() == 2 and (x.stride(1) == 1 or x.shape[1] == 1)
    return x.data_ptr(), 4 * x.stride(0)


def load(folder: Path | None = None, target: Target | None = None, threads: int = 1) -> Kernels:
    """The kernels for `target`, by default the best for this machine, on so many threads.

    Their machine code is kept in `folder` if one is given. Raises `Unsupported` where the processor
    has no fused multiply-add.
    """
    target = target or runnable()[0]
    code = objects.machine_code(target, folder, compiler.compile_object)
    return Kernels(target, code, threads)
