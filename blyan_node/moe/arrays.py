"""Between numpy, in which rows travel, and the engine's tensors; neither way copies."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def tensor_of(array: npt.NDArray[Any]) -> Tensor:
    """The same memory as a tensor; `array` must be writable."""
    return torch.from_numpy(array)


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """The same memory as an array, with the tensor's strides."""
    return tensor.numpy()
