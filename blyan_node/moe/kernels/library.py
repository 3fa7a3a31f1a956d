"""The kernels of this process: plain functions over tensors.

Every result's bits are those of docs/sums.md, whatever the target, the other rows of a batch, the
thread that calls and the number of threads that share the work.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blyan_node.moe.kernels import attention, compiler, objects
from blyan_node.moe.kernels.compiler import Kernel
from blyan_node.moe.kernels.matrix import Buffer, Matrix, address
from blyan_node.moe.kernels.recording import Recorder
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
    "add": (*_ROWS * 3, _COUNT, _COUNT),
    "combine": (*_ROWS * 3, _COUNT, _COUNT, _PLACE, _COUNT),
    "swiglu": (*_ROWS * 3, _COUNT, _COUNT),
    "gpt_oss": (*_ROWS * 2, _COUNT, _COUNT, _NUMBER, _NUMBER),
    "rms_norm": (*_ROWS * 2, _COUNT, _COUNT, _PLACE, _NUMBER),
    "softmax": (*_ROWS * 2, _COUNT, _COUNT),
    "sigmoid": (*_ROWS * 2, _COUNT, _COUNT),
    "rotate_halves": (*_ROWS * 2, _COUNT, _COUNT, _PLACE, _PLACE, *[_COUNT] * 4),
    "rotate_pairs": (*_ROWS * 2, _COUNT, _COUNT, _PLACE, _PLACE, *[_COUNT] * 4),
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
        self._columns = {
            name: self._code.function(f"call_columns_{name}", LINEAR)
            for name, storage in STORAGES.items()
            if storage.by_columns
        }
        self._epilogues = {
            name: self._code.function(f"call_{name}", arguments)
            for name, arguments in _EPILOGUES.items()
        }
        run = self._code.function("call_run", (_PLACE, _COUNT)).call
        self.recorder = Recorder(run if threads == 1 else None)
        self._read = self._code.function("call_read", (_PLACE, _COUNT, _PLACE)).call
        self._attend = self._code.function("call_attend", (_PLACE, _COUNT, _COUNT)).call

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
        out = self._empty(rows, outs) if out is None else out
        begin, end = span or (0, outs)
        assert x.shape == (rows, depth) and out.shape == (rows, outs) and 0 <= begin <= end <= outs
        kernel = (self._columns if matrix.by_columns else self._linear)[matrix.storage.name]
        given = (matrix.place, *_rows(x), rows, *_rows(out))
        if self._dry:
            pass
        elif self._workers.threads == 1:
            kernel.call(*given, begin, end)
        else:
            self._share(kernel, given, (begin, end), rows * depth)
        if self.recorder.active is not None:
            share = partial(self._share, kernel, given, (begin, end), rows * depth)
            self.recorder.active.add(kernel.address, (*given, begin, end), share, matrix)
        return out

    def _share(
        self, kernel: Kernel, given: Sequence[int], span: tuple[int, int], products: int
    ) -> None:
        """Has the columns of a span, of so many products each, computed by all threads."""
        begin, end = span

        def part(first: int, last: int) -> None:
            kernel.call(*given, begin + first, begin + last)

        self._workers.share(part, end - begin, products * (end - begin), _COLUMNS_STEP)

    @property
    def _dry(self) -> bool:
        return self.recorder.active is not None and self.recorder.active.dry

    def kernel(self, name: str, *arguments: object) -> Kernel:
        """The function `call_NAME`, by the ctypes of its arguments."""
        return self._code.function(f"call_{name}", arguments)

    def _empty(self, *shape: int) -> Tensor:
        recording = self.recorder.active
        return torch.empty(shape) if recording is None else recording.empty(*shape)

    def _call(self, name: str, *given: int | float, weights: object = None) -> None:
        kernel = self._epilogues[name]
        if not self._dry:
            kernel.call(*given)
        if self.recorder.active is not None:
            share = partial(kernel.call, *given)
            self.recorder.active.add(kernel.address, given, share, weights)

    def read(self, buffer: Buffer, length: int) -> int:
        """Reads `length` bytes and does next to nothing: the limit of every product of one row."""
        found = ctypes.c_int64()
        self._read(address(buffer), length, ctypes.addressof(found))
        return found.value

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y, both [n, width]."""
        out = self._empty(*x.shape)
        assert x.shape == y.shape
        self._call("add", *_rows(out), *_rows(x), *_rows(y), *x.shape)
        return out

    def combine(self, residual: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
        """residual [n, width] + the sum of rows [n, k, width] by weights [n, k], k ascending."""
        n, ranks, width = rows.shape
        assert weights.shape == (n, ranks) and residual.shape == (n, width) and ranks > 0
        assert weights.is_contiguous() and rows.is_contiguous() and weights.dtype == torch.float32
        out = self._empty(n, width)
        self._call(
            "combine", *_rows(out), *_rows(residual), *_rows(rows.view(n, ranks * width)),
            n, width, weights.data_ptr(), ranks,
        )  # fmt: skip
        return out

    def swiglu(self, gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
        """SiLU(gate) · up, both [n, width]."""
        out = self._empty(*gate.shape) if out is None else out
        self._call("swiglu", *_rows(out), *_rows(gate), *_rows(up), *gate.shape)
        return out

    def gpt_oss(
        self, both: Tensor, limit: float, alpha: float, out: Tensor | None = None
    ) -> Tensor:
        """(up + 1) · gate · sigmoid(alpha · gate): both [n, 2 · width] has gate and up in turn.

        gate is clamped to at most `limit`, up to ± `limit`.
        """
        n, width = both.shape[0], both.shape[1] // 2
        out = self._empty(n, width) if out is None else out
        self._call("gpt_oss", *_rows(out), *_rows(both), n, width, float(limit), float(alpha))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """x · (1 / √(mean of squares + eps)) · weight, for each row of x [n, width]."""
        assert weight.dtype == torch.float32 and weight.is_contiguous()
        assert weight.shape == x.shape[1:]
        out = self._empty(*x.shape) if out is None else out
        self._call(
            "rms_norm",
            *_rows(out),
            *_rows(x),
            *x.shape,
            weight.data_ptr(),
            float(eps),
            weights=weight,
        )
        return out

    def softmax(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Softmax of each row of x [n, width]; `out` may be `x`."""
        out = self._empty(*x.shape) if out is None else out
        self._call("softmax", *_rows(out), *_rows(x), *x.shape)
        return out

    def sigmoid(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """1 / (1 + e^-x) of x [n, width]; `out` may be `x`."""
        out = self._empty(*x.shape) if out is None else out
        self._call("sigmoid", *_rows(out), *_rows(x), *x.shape)
        return out

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Rotary embedding of x [n, heads, dim], row by row; cos and sin are [n, dim / 2].

        Pairs are (i, i + dim / 2), or (2i, 2i + 1) if interleaved; the result has them in halves.
        `out` takes it: float32 [n, heads, dim] of any strides but the last.
        """
        n, heads, dim = x.shape
        assert self.recorder.active is None  # the angles are other ones for each row
        out = torch.empty(n, heads, dim) if out is None else out
        for angles in (cos, sin):
            assert angles.dtype == torch.float32 and angles.is_contiguous()
            assert angles.shape == (n, dim // 2) and dim % 2 == 0
        for rows in (x, out):
            assert rows.dtype == torch.float32 and rows.stride(2) == 1 and rows.shape == x.shape
        self._epilogues["rotate_pairs" if interleaved else "rotate_halves"].call(
            out.data_ptr(), 4 * out.stride(0), x.data_ptr(), 4 * x.stride(0), n, dim // 2,
            cos.data_ptr(), sin.data_ptr(), 2 * dim, heads, 4 * out.stride(1), 4 * x.stride(1),
        )  # fmt: skip
        return out

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
        """Attention of the last n positions: query [n, heads, dim] → [n, heads, value dim].

        keys [kv heads, seen, dim] and values [kv heads, seen, value dim] end with the last row's
        own; the row r before it does not see the last r, and none sees more than `window`. sinks
        [heads] take part in the softmax and have no value.
        """
        (n, heads, dim), (kv_heads, seen, value_dim) = query.shape, values.shape
        assert keys.shape == (kv_heads, seen, dim) and heads % kv_heads == 0 and seen >= n > 0
        assert keys.stride(2) == values.stride(2) == query.stride(2) == 1
        assert keys.dtype == values.dtype == query.dtype == torch.float32
        assert self.recorder.active is None  # there are more positions for each row
        out, scores = torch.empty(n, heads, value_dim), torch.empty(heads, seen + 1)
        factor, group = ctypes.c_float(scale), heads // kv_heads
        parts = _parts(group, -(-self._workers.threads // kv_heads))
        task = _Task(
            query.data_ptr(), 4 * query.stride(0), 4 * query.stride(1),
            out.data_ptr(), 4 * heads * value_dim, 4 * value_dim,
            keys.data_ptr(), 4 * keys.stride(0), 4 * keys.stride(1),
            values.data_ptr(), 4 * values.stride(0), 4 * values.stride(1),
            scores.data_ptr(), ctypes.addressof(factor), 0 if sinks is None else sinks.data_ptr(),
            group, parts, n, seen, window or seen, dim, value_dim,
        )  # fmt: skip
        place = ctypes.addressof(task)
        products = 2 * n * heads * seen * dim
        self._workers.share(lambda *span: self._attend(place, *span), kv_heads * parts, products)
        return out


def _parts(group: int, wanted: int) -> int:
    """The least number of equal parts of a group that is at least `wanted`, or the most."""
    return next((n for n in range(wanted, group) if group % n == 0), group)


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
