"""Matrices in the precision that their holder chose, made from what was published.

A conversion is deterministic to the bit on every machine: each step is one operation of IEEE 754,
rounded to nearest, ties to even. The definition is docs/precision.md.

Only matrices are converted, and only to something narrower (`protocols.precision`). Norms, biases
and sinks are small and stay. Routers stay because what they decide, which experts a token passes,
is all or nothing; `kv_b` of latent attention stays because it is computed with from both sides,
and a scale belongs to one. Published as FP8 with a scale for each block it becomes float32 in every
precision: products by columns do not read that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from blyan_node.moe.layout import FLOATS, SCALE_SUFFIX, SubjectLayout, TensorLayout
from blyan_node.moe.pages import pages
from blyan_node.moe.stored import TILE_FLOATS, Fp8Blocks, Mxfp4, Scaled, Weight, widened
from blyan_node.moe.strict_json import refuse
from blyan_node.moe.torch_errors import OutOfMemory, said
from blyan_node.moe.weights import Weights, by_role, copied_bytes, load_part, matrices
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused
from protocols.precision import Precision, effective
from protocols.tensors.manifest import DTYPE_BYTES, Dtype, Manifest, TensorEntry

LEAST_SCALE = 2.0**-126  # float32's least normal number: also the scale of a row of zeros
_INT8_MOST, _FP8_MOST = 127.0, 448.0
_SCALE_BYTES = 4
_BOTH_SIDED = "kv_b"  # the role of latent attention's matrix that makes keys and values
_TARGETS: Mapping[Precision, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class HeldPart:
    """A subject's tensors as they are held: by role, matrices as [out, in].

    `bytes` is what they take in memory, `copied` how much of it is not where it was published. A
    part that was `converted` needs nothing of that any more.
    """

    tensors: dict[str, Weight]
    bytes: int
    copied: int
    converted: bool

    @property
    def storage(self) -> str:
        """How the matrices lie: `int8`, `mxfp4`, `fp8_blocks`, `bfloat16`."""
        found = {_storage(one) for one in self.tensors.values() if len(one.shape) == 2}
        return "+".join(sorted(found))


def hold(
    part: SubjectLayout,
    given: Weights,
    precision: Precision,
    aligned_bytes: int = 1,
    device: torch.device | None = None,
) -> HeldPart:
    """Loads a part in a precision; raises `Refused` (BAD_MODEL) by name.

    What is not converted is used in place, unless something else of the part is, or all of it goes
    to a `device`, which is refused (NOT_ALLOWED) if that has no room or not the type.
    """
    held = _hold(part, given, precision, aligned_bytes)
    if effective(precision) == "int8":  # is for the sake of whole numbers, which MXFP4 is as well
        held = replace(held, tensors={r: _by_whole_rows(one) for r, one in held.tensors.items()})
    if device is None:
        return held
    try:
        there = {role: moved(weight, device) for role, weight in held.tensors.items()}
    except OutOfMemory as error:
        raise Refused(
            ErrorCode.NOT_ALLOWED,
            f"{part.subject} does not fit into the memory of {device}",
            said(error),
            "Start the node with a smaller --memory, or give it another --device.",
        ) from None
    except TypeError as error:  # so torch says that a device has no such type
        raise Refused(
            ErrorCode.NOT_ALLOWED,
            f"{part.subject} cannot be held on {device}",
            said(error),
            "Start the node with another --precision, or with --device cpu.",
        ) from None
    return replace(held, tensors=there, copied=held.bytes, converted=True)


def _by_whole_rows(weight: Weight) -> Weight:
    """The same weight, MXFP4 as it is multiplied by rows of whole numbers."""
    if isinstance(weight, Mxfp4):
        return Mxfp4(weight.blocks, weight.scales, whole_rows=True)
    return weight


def moved(weight: Weight, device: torch.device) -> Weight:
    """A matrix or vector on a device; itself if it is there."""
    if isinstance(weight, Tensor):
        return weight.to(device)
    pieces = _pieces(weight)
    if all(piece.device == device for piece in pieces):
        return weight
    return type(weight)(*(piece.to(device) for piece in pieces))


def _hold(
    part: SubjectLayout, given: Weights, precision: Precision, aligned_bytes: int
) -> HeldPart:
    loaded = load_part(part, given, aligned_bytes)
    tensors = by_role(part, loaded)
    narrow = [
        tensor
        for tensor in part.tensors
        if tensor.name in given and converts(part, tensor, given[tensor.name][0], precision)
    ]
    if not narrow:
        held = matrices(tensors)
        widened_bytes = _widen_both_sided(held)
        copied = copied_bytes(loaded, given) + widened_bytes
        return HeldPart(held, _bytes(held), copied, False)
    names = {tensor.role: f"{part.subject}: {tensor.name}" for tensor in narrow}
    kept = matrices({role: one.clone() for role, one in tensors.items() if role not in names})
    _widen_both_sided(kept)
    held = kept | {role: convert(tensors[role], precision, names[role]) for role in names}
    return HeldPart(held, _bytes(held), _bytes(held), True)


def _widen_both_sided(held: dict[str, Weight]) -> int:
    """Makes float32 of a `kv_b` that is FP8 in blocks; how many bytes that takes."""
    both = held.get(_BOTH_SIDED)
    if not isinstance(both, Fp8Blocks):
        return 0
    held[_BOTH_SIDED] = widened(both)
    return 4 * both.codes.numel()


def converts(part: SubjectLayout, tensor: TensorLayout, dtype: Dtype, precision: Precision) -> bool:
    """Whether a tensor that is stored as `dtype` is held in another type for `precision`."""
    kept = part.kind is Kind.ROUTER or tensor.idle
    kept = kept or tensor.role == _BOTH_SIDED or tensor.role.endswith("_scales")
    return not kept and narrows(tensor.shape, dtype, precision)


def narrows(shape: tuple[int, ...], dtype: Dtype, precision: Precision) -> bool:
    """Whether a matrix of this shape and type would become narrower."""
    target = _TARGETS.get(effective(precision))
    if target is None or len(shape) != 2 or dtype not in FLOATS:
        return False
    return target.itemsize < DTYPE_BYTES[dtype]


def part_bytes(part: SubjectLayout, manifest: Manifest, precision: Precision) -> int:
    """The bytes that holding a part takes.

    Raises `Refused` (BAD_MODEL) for a tensor that is none of the part's.
    """
    total, layouts = 0, {tensor.name: tensor for tensor in part.tensors}
    for entry in manifest.tensors:
        tensor = layouts.get(entry.name)
        if tensor is None or entry.shape != tensor.shape:
            refuse(
                f"{part.subject}: {entry.name[:80]!a} {list(entry.shape)} is none of its tensors",
                subject=part.subject,
            )
        if converts(part, tensor, entry.dtype, precision):
            channels = entry.shape[1 if tensor.transposed else 0]
            total += _converted_bytes(entry.shape, precision, channels)
        elif tensor.role == f"{_BOTH_SIDED}_codes":
            total += 4 * entry.size
        elif tensor.role != f"{_BOTH_SIDED}_scales":
            total += _held_bytes(entry)
    return total


def expert_bytes(manifest: Manifest, precision: Precision) -> int:
    """The most bytes that holding an expert takes, whatever its family calls its tensors."""
    return sum(
        _converted_bytes(entry.shape, precision, max(entry.shape))
        if narrows(entry.shape, entry.dtype, precision) and not entry.name.endswith(SCALE_SUFFIX)
        else _held_bytes(entry)
        for entry in manifest.tensors
    )


def _held_bytes(entry: TensorEntry) -> int:
    """What is not converted takes its size; scales of FP8 blocks are held as float32."""
    scales = entry.name.endswith(SCALE_SUFFIX)
    return prod(entry.shape) * _SCALE_BYTES if scales else entry.size


def _converted_bytes(shape: tuple[int, ...], precision: Precision, channels: int) -> int:
    size = _TARGETS[effective(precision)].itemsize
    return prod(shape) * size + (channels * _SCALE_BYTES if size == 1 else 0)


def _bytes(tensors: Mapping[str, Weight]) -> int:
    return sum(
        piece.numel() * piece.element_size() for one in tensors.values() for piece in _pieces(one)
    )


def _pieces(weight: Weight) -> tuple[Tensor, ...]:
    if isinstance(weight, Scaled):
        return weight.codes, weight.scales
    if isinstance(weight, Fp8Blocks):
        return weight.codes, weight.scales
    return (weight.blocks, weight.scales) if isinstance(weight, Mxfp4) else (weight,)


def _storage(weight: Weight) -> str:
    if isinstance(weight, Mxfp4):
        return "mxfp4"
    if isinstance(weight, Fp8Blocks):
        return "fp8_blocks"
    dtype = weight.codes.dtype if isinstance(weight, Scaled) else weight.dtype
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def convert(weight: Tensor, precision: Precision, name: str) -> Tensor | Scaled:
    """The matrix [out, in] in `precision`; `name` is its own, for errors.

    Works in tiles, so that beside the result only a few MiB are taken. Raises `Refused` (BAD_MODEL)
    for infinities, NaN, and what the precision's largest number does not reach.
    """
    target = _TARGETS[effective(precision)]
    rows, columns = weight.shape
    codes = pages.empty(rows, columns, target)
    scales = torch.empty(rows)
    step = max(1, TILE_FLOATS // max(1, columns))
    for first in range(0, rows, step):
        last = min(rows, first + step)
        tile = weight[first:last].to(torch.float32, copy=True)
        if not tile.isfinite().all():
            refuse(f"{name} has infinities or NaN: {precision} cannot hold it, as-published can")
        if target.itemsize == 1:
            scales[first:last] = _scale(tile, _INT8_MOST if target == torch.int8 else _FP8_MOST)
        codes[first:last] = _bfloat16(tile) if target == torch.bfloat16 else tile.to(target)
    if target.itemsize == 1:
        return Scaled(codes, scales)
    if not codes.isfinite().all():
        refuse(f"{name} has a value that is too large for {precision}: hold it as-published")
    return codes


def _scale(tile: Tensor, most: float) -> Tensor:
    """Divides each row by its scale, which is returned [rows], and rounds for int8."""
    scales = tile.abs().amax(1).div_(most).clamp_(min=LEAST_SCALE)
    tile.div_(scales[:, None])
    if most == _INT8_MOST:
        tile.round_()
    tile.clamp_(-most, most)
    return scales


def _bfloat16(tile: Tensor) -> Tensor:
    """Rounds with integers: some processors' own instruction takes denormals for zero."""
    bits = tile.view(torch.int32)
    odd = bits.bitwise_right_shift(16).bitwise_and_(1)
    rounded = bits.add_(odd.add_(0x7FFF)).bitwise_right_shift_(16)
    return rounded.to(torch.int16).view(torch.bfloat16)
