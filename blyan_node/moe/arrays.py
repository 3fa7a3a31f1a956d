"""Between numpy, in which rows travel, files, and the engine's tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from blyan_node.moe.safetensors_file import header_bytes, write_whole
from protocols.tensors.manifest import Dtype

_DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.int64: Dtype.I64}


def tensor_of(array: npt.NDArray[Any]) -> Tensor:
    """The same memory as a tensor; `array` must be writable."""
    return torch.from_numpy(array)


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """The same memory as an array, with the tensor's strides."""
    return tensor.numpy()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes a safetensors file whole or not at all; returns its size in bytes."""
    described = {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    bodies = (t.contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors.values())
    return write_whole(path, (header_bytes(described), *bodies))
