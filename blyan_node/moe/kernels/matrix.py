"""Where a matrix of weights lies: what a kernel is told about it."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from blyan_node.moe.kernels.fields import FIELDS
from blyan_node.moe.kernels.order import BLOCK
from blyan_node.moe.kernels.storages import STORAGES

_TILE_COLUMNS = 4

# What a matrix without scales or biases is given: neither changes a bit of any sum.
_ONE, _NOTHING = np.array([1.0], np.float32), np.array([-0.0], np.float32)

_DTYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}

# A torch tensor, a numpy array, or anything that has the buffer protocol.
Buffer = Any


class _Place(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]


def address(buffer: Buffer) -> int:
    """Where a contiguous buffer begins in memory."""
    if isinstance(buffer, torch.Tensor):
        return buffer.data_ptr()
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def _length(buffer: Buffer) -> int:
    if isinstance(buffer, torch.Tensor):
        assert buffer.is_contiguous()
        return buffer.numel() * buffer.element_size()
    return memoryview(buffer).nbytes


class Matrix:
    """Weights [outs, depth] of one storage, read where they are: x · weightsᵀ · scales + biases.

    `weights` has `outs` rows of `depth` weights, one after another, at any address. mxfp4 has two
    weights in a byte, the lower four bits first, and `block_scales` with a byte for each 32, and so
    has mxfp4_whole, which is multiplied by rows of whole numbers (docs/sums.md);
    fp8_blocks has float32 `block_scales` for each 128 outs by 128 of their weights. Any
    storage may have `scales` and `biases`, float32 [outs]. The buffers are kept alive. By columns,
    float32, bfloat16 or float16 lie as [depth, outs], without scales.
    """

    def __init__(
        self,
        storage: str,
        shape: Sequence[int],
        weights: Buffer,
        *,
        block_scales: Buffer | None = None,
        scales: Buffer | None = None,
        biases: Buffer | None = None,
        by_columns: bool = False,
    ) -> None:
        self.by_columns = by_columns
        self.storage = STORAGES[storage]
        self.outs, self.depth = shape
        grid = self.storage.grid
        if (grid is not None) != (block_scales is not None):
            raise ValueError(f"{storage}: block_scales belong to mxfp4 and fp8_blocks alone")
        if self.storage.bits < 8 and self.depth % BLOCK:
            raise ValueError(f"{storage}: depth {self.depth} is not a multiple of {BLOCK}")
        if by_columns and (not self.storage.by_columns or scales is not None):
            raise ValueError(f"{storage}: it is not read by columns, nor is what has scales")
        self._buffers = (weights, block_scales, scales, biases)
        stride = self.storage.bytes(self.depth)
        down, across = (0, 0) if grid is None else grid.shape(self.outs, self.depth)
        scale_stride = 0 if grid is None else across * grid.size
        lengths = (stride * self.outs, scale_stride * down, 4 * self.outs, 4 * self.outs)
        for buffer, length in zip(self._buffers, lengths, strict=True):
            if buffer is not None and _length(buffer) != length:
                raise ValueError(f"{storage} {shape}: {_length(buffer)} bytes, not {length}")
        self.bytes = sum(_length(buffer) for buffer in self._buffers if buffer is not None)
        self._place = _Place(
            weights=address(weights),
            weights_stride=self.storage.bytes(self.outs) if by_columns else stride,
            block_scales=0 if block_scales is None else address(block_scales),
            block_scales_stride=scale_stride,
            scales=address(_ONE if scales is None else scales),
            scales_stride=0 if scales is None else 4,
            biases=address(_NOTHING if biases is None else biases),
            biases_stride=0 if biases is None else 4,
            depth=self.depth,
            tiles_ahead=1 + self.storage.ahead // max(1, stride * _TILE_COLUMNS),
        )
        self.place = ctypes.addressof(self._place)

    @classmethod
    def of(
        cls, weight: torch.Tensor, *, scales: Buffer | None = None, biases: Buffer | None = None
    ) -> "Matrix":
        """A weight [outs, depth] as torch keeps it, or a transposed view of one."""
        shape, by_columns = weight.shape, weight.dim() == 2 and not weight.is_contiguous()
        lying = weight.t() if by_columns else weight
        if weight.dtype not in _DTYPES or weight.dim() != 2 or not lying.is_contiguous():
            raise ValueError(f"{weight.dtype} {tuple(shape)} cannot be read in place")
        storage = _DTYPES[weight.dtype]
        return cls(storage, shape, lying, scales=scales, biases=biases, by_columns=by_columns)
