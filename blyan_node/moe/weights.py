"""From bytes in a pack file to tensors in their stored precision, where they lie.

Nothing is copied but float32 that begins at an odd address; the buffer must stay mapped, and the
tensors keep it alive. What computes with them widens them (`blyan_node.moe.stored`).
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from math import prod

import torch
from torch import Tensor

from blyan_node.moe.layout import SubjectLayout
from blyan_node.moe.stored import Fp8Blocks, Mxfp4, Weight
from blyan_node.moe.strict_json import refuse
from protocols.ids import Subject
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

Weights = Mapping[str, tuple[Dtype, tuple[int, ...], memoryview]]
ReadWeights = Callable[[Subject], Weights]

_TORCH = {
    Dtype.F32: torch.float32,
    Dtype.BF16: torch.bfloat16,
    Dtype.F16: torch.float16,
    Dtype.U8: torch.uint8,
    Dtype.F8_E4M3: torch.float8_e4m3fn,
}


def load_part(part: SubjectLayout, tensors: Weights, aligned_bytes: int = 1) -> dict[str, Tensor]:
    """A subject's tensors by local name; raises `Refused` (BAD_MODEL) by name.

    float32 that does not begin at a multiple of `aligned_bytes` is copied.
    """
    loaded = {}
    for tensor in part.tensors:
        if tensor.idle and tensor.name not in tensors:
            continue
        if tensor.name not in tensors:
            refuse(f"{part.subject} has no tensor {tensor.name}", subject=part.subject)
        dtype, shape, data = tensors[tensor.name]
        if tuple(shape) != tensor.shape or dtype not in tensor.dtypes:
            refuse(
                f"{part.subject}: {tensor.name} is {dtype} {list(shape)}, expected"
                f" {' or '.join(tensor.dtypes)} {list(tensor.shape)}",
                subject=part.subject,
            )
        if len(data) != prod(shape) * DTYPE_BYTES[dtype]:
            refuse(f"{part.subject}: {tensor.name} has {len(data)} bytes", subject=part.subject)
        loaded[tensor.name] = in_place(dtype, tensor.shape, data, aligned_bytes)
    for name in tensors:
        if name not in loaded:
            refuse(f"{part.subject}: {name[:80]!a} is none of its tensors", subject=part.subject)
    return loaded


def by_role(part: SubjectLayout, loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A loaded part's tensors as whatever computes wants them: by role, matrices as [out, in]."""
    return {
        tensor.role: loaded[tensor.name].t() if tensor.transposed else loaded[tensor.name]
        for tensor in part.tensors
        if not tensor.idle
    }


def matrices(tensors: Mapping[str, Tensor]) -> dict[str, Weight]:
    """Tensors by role, MXFP4 and FP8 put together from what they consist of.

    Raises `Refused` (BAD_MODEL).
    """
    found: dict[str, Weight] = {}
    for role, tensor in tensors.items():
        if role.endswith("_blocks"):
            name = role.removesuffix("_blocks")
            found[name] = Mxfp4(tensor, tensors[f"{name}_scales"])
        elif role.endswith("_codes"):
            name = role.removesuffix("_codes")
            found[name] = Fp8Blocks(tensor, tensors[f"{name}_scales"].float())
        elif not role.endswith("_scales"):
            found[role] = tensor
    return found


def vector(tensors: Mapping[str, Weight], role: str) -> Tensor | None:
    """A bias, a norm's weight, sinks: float32, widened if need be; None if there is none."""
    found = tensors.get(role)
    if found is None:
        return None
    assert isinstance(found, Tensor)
    return found.float()


def stored_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The memory that loaded tensors occupy when they are used: their bytes as stored."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def copied_bytes(loaded: Mapping[str, Tensor], tensors: Weights) -> int:
    """How many bytes of `loaded` are not where `tensors` have them."""
    return sum(
        len(data)
        for name, (_, _, data) in tensors.items()
        if len(data) and loaded[name].data_ptr() != _bytes_of(data).data_ptr()
    )


def in_place(
    dtype: Dtype, shape: tuple[int, ...], data: memoryview, aligned_bytes: int = 1
) -> Tensor:
    """A tensor of little-endian bytes, where they lie unless products need them elsewhere."""
    if not len(data):
        return torch.empty(shape, dtype=_TORCH[dtype])
    tensor = _bytes_of(data)
    if dtype == Dtype.F32 and tensor.data_ptr() % aligned_bytes:
        tensor = tensor.clone()  # products of what is not aligned have other bits
    return tensor.view(_TORCH[dtype]).view(shape)


def _bytes_of(data: memoryview) -> Tensor:
    _allow_read_only_buffers()
    return torch.frombuffer(data, dtype=torch.uint8)


@cache
def _allow_read_only_buffers() -> None:
    """torch warns once a process that it might write to a mapped file; nothing here writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)
