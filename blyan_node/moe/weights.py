"""From bytes in a pack file to float32 tensors: in place where they are float32 already.

float32 tensors are used where they lie, without a copy; the buffer must then stay mapped, and the
tensor keeps it alive. bfloat16 is widened once, exactly. Both count as resident.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from math import prod

import torch
from torch import Tensor

from blyan_node.moe.layout import SubjectLayout
from blyan_node.moe.strict_json import refuse
from protocols.ids import Subject
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

Weights = Mapping[str, tuple[Dtype, tuple[int, ...], memoryview]]
ReadWeights = Callable[[Subject], Weights]

_ALIGNED_BYTES = 16
_TORCH = {Dtype.F32: torch.float32, Dtype.BF16: torch.bfloat16}


def load_part(part: SubjectLayout, tensors: Weights) -> dict[str, Tensor]:
    """A subject's tensors in float32 by local name; raises `Refused` (BAD_MODEL) by name."""
    loaded = {}
    for tensor in part.tensors:
        if tensor.name not in tensors:
            refuse(f"{part.subject} has no tensor {tensor.name}", subject=part.subject)
        dtype, shape, data = tensors[tensor.name]
        if tuple(shape) != tensor.shape or dtype not in _TORCH:
            refuse(
                f"{part.subject}: {tensor.name} is {dtype} {list(shape)}, expected F32 or BF16"
                f" {list(tensor.shape)}",
                subject=part.subject,
            )
        if len(data) != prod(shape) * DTYPE_BYTES[dtype]:
            refuse(f"{part.subject}: {tensor.name} has {len(data)} bytes", subject=part.subject)
        loaded[tensor.name] = _float32(dtype, tensor.shape, data)
    for name in tensors:
        if name not in loaded:
            refuse(f"{part.subject}: {name[:80]!a} is none of its tensors", subject=part.subject)
    return loaded


def by_role(part: SubjectLayout, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded part's tensors as whatever computes wants them: by role, matrices as [out, in]."""
    return {
        tensor.role: loaded[tensor.name].t() if tensor.transposed else loaded[tensor.name]
        for tensor in part.tensors
    }


def resident_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The memory that loaded tensors occupy when they are used."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _float32(dtype: Dtype, shape: tuple[int, ...], data: memoryview) -> Tensor:
    _allow_read_only_buffers()
    tensor = torch.frombuffer(data, dtype=_TORCH[dtype]).view(shape)
    if dtype == Dtype.F32 and tensor.data_ptr() % _ALIGNED_BYTES:
        return tensor.clone()
    return tensor.float()


@cache
def _allow_read_only_buffers() -> None:
    """torch warns once a process that it might write to a mapped file; nothing here writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
