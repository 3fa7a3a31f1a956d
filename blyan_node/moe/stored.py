"""Weights in the precision in which they were published, widened to float32 while they are used.

A matrix stays where it lies, in a mapped pack file: a tensor of its stored type, `Mxfp4` or
`Fp8Blocks`. A product walks it in tiles; each tile is widened, exactly, into a buffer of the
thread's own that is used again for the next one and so stays in the cache. float32 is not widened
and not copied. What a tile may be, so that its products have the same bits as those of the whole,
and how fast it is, is in docs/decisions/0006-weights-in-place.md.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from blyan_node.moe.strict_json import refuse

TILE_FLOATS = 1 << 20  # 4 MiB: a third-level cache has it, and a product has rows to work on
TILE_ROWS = 64  # a tile has a multiple of these, or is the last

BLOCK = 32  # values that share a scale
SCALE_MAX = 240  # a greater one, above 2^113, is refused; so is 255, which is no number
FP8_BLOCK = 128  # rows, and columns, of the weights that share a scale
FP8_SCALE_MAX = 2.0**100
_BOTH_NIBBLES = 0x0100_1000  # times a byte: each nibble in the upper 4 of 16 bits
_SIGN_AND_VALUE = -0x71FF_7200  # 0x8E008E00: the bits of two halves that nibbles set
_HALF_BIAS = 2.0**14  # a nibble's bits in a half are its value over this


class Mxfp4:
    """A matrix [out, in] of 4-bit floats, 32 of a row with one power of two (OCP MX v1.0: E2M1).

    `blocks` is uint8 [out, in / 32, 16], the even value in the low nibble; `scales` is uint8
    [out, in / 32], each an exponent plus 127. Where `whole_rows`, kernels make whole numbers of the
    rows that they multiply (docs/sums.md).
    """

    def __init__(self, blocks: Tensor, scales: Tensor, *, whole_rows: bool = False) -> None:
        """Raises `Refused` (BAD_MODEL) for a scale that float32 cannot compute with."""
        assert blocks.shape == (*scales.shape, BLOCK // 2)
        if scales.numel() and int(scales.max()) > SCALE_MAX:
            refuse(f"an MXFP4 scale is {int(scales.max())}, at most {SCALE_MAX} is read")
        self.blocks = blocks
        self.scales = scales
        self.shape = (scales.shape[0], scales.shape[1] * BLOCK)
        self.whole_rows = whole_rows

    def widen(self, first: int, last: int, out: Tensor) -> None:
        """Writes the rows [first, last) into `out`, contiguous float32 [last - first, in]."""
        packed = self.blocks[first:last].reshape(-1)
        if packed.is_cpu:
            pairs = _scratch.pairs(packed.numel()).copy_(packed).mul_(_BOTH_NIBBLES)
        else:
            pairs = packed.to(torch.int32).mul_(_BOTH_NIBBLES)
        halves = pairs.view(torch.int16).bitwise_right_shift_(3)  # the sign is drawn along
        pairs.bitwise_and_(_SIGN_AND_VALUE)
        out.view(-1).copy_(halves.view(torch.float16))
        scales = self.scales[first:last].reshape(-1).to(torch.int32)
        factors = torch.index_select(_factors(scales.device), 0, scales)
        out.view(-1, BLOCK).mul_(factors[:, None])


class Fp8Blocks:
    """A matrix [out, in] of FP8 (e4m3fn) of which 128 by 128 weights share a float32 scale.

    `codes` is float8_e4m3fn [out, in], `scales` float32 [out / 128, in / 128], both rounded up. A
    weight is its code's number times the scale of its block, rounded to float32.
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        """Raises `Refused` (BAD_MODEL) for a scale that float32 cannot compute with."""
        grid = tuple(-(-size // FP8_BLOCK) for size in codes.shape)
        assert codes.dtype == torch.float8_e4m3fn and scales.shape == grid
        if not bool((scales.abs() <= FP8_SCALE_MAX).all()):
            refuse(f"an FP8 scale is no number up to {FP8_SCALE_MAX:g}")
        self.codes = codes
        self.scales = scales
        self.shape = (codes.shape[0], codes.shape[1])

    def widen(self, first: int, last: int, out: Tensor) -> None:
        """Writes the rows [first, last) into `out`, contiguous float32 [last - first, in]."""
        out.copy_(self.codes[first:last])
        for row in range(first // FP8_BLOCK, -(-last // FP8_BLOCK)):
            begin, end = max(first, row * FP8_BLOCK), min(last, (row + 1) * FP8_BLOCK)
            along = self.scales[row].repeat_interleave(FP8_BLOCK)[: self.shape[1]]
            out[begin - first : end - first].mul_(along)


class Scaled:
    """A matrix [out, in] of int8 or FP8 (e4m3fn) codes; a row's weights are its codes times scale.

    `codes` is [out, in], `scales` float32 [out].
    """

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        assert codes.shape[:1] == scales.shape and scales.dtype == torch.float32
        self.codes = codes
        self.scales = scales
        self.shape = (codes.shape[0], codes.shape[1])

    def widen(self, first: int, last: int, out: Tensor) -> None:
        """Writes the codes of rows [first, last) into `out`, float32 [last - first, in].

        The scales belong after the sums (docs/sums.md).
        """
        out.copy_(self.codes[first:last])


Weight = Tensor | Mxfp4 | Fp8Blocks | Scaled

# A scale's power of two, times what a nibble in a half is short of.
_FACTORS = torch.tensor([2.0 ** (scale - 127) * _HALF_BIAS for scale in range(SCALE_MAX + 1)])


@cache
def _factors(device: torch.device) -> Tensor:
    return _FACTORS.to(device)


class _Scratch(threading.local):
    """The buffers of one thread."""

    def __init__(self) -> None:
        self._tile = _buffer(0, torch.float32)
        self._pairs = _buffer(0, torch.int32)

    def tile(self, rows: int, columns: int) -> Tensor:
        """float32 [rows, columns], with what was left there."""
        if self._tile.numel() < rows * columns:
            self._tile = _buffer(max(TILE_FLOATS, rows * columns), torch.float32)
        return self._tile[: rows * columns].view(rows, columns)

    def pairs(self, count: int) -> Tensor:
        """int32 [count], with what was left there."""
        if self._pairs.numel() < count:
            self._pairs = _buffer(max(TILE_FLOATS // 2, count), torch.int32)
        return self._pairs[:count]


def _buffer(count: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # else only inference mode could write to it
        return torch.empty(count, dtype=dtype)


_scratch = _Scratch()


def tiles(weight: Weight, rows: int) -> Iterator[tuple[int, Tensor]]:
    """The float32 tiles of a matrix that is stored by rows, each with the row that it begins at.

    They are for a product with `rows` rows; each is valid until the next. Of a scaled matrix they
    are of its codes.
    """
    count, width = weight.shape
    in_place = isinstance(weight, Tensor) and weight.dtype == torch.float32
    step = max(TILE_ROWS, TILE_FLOATS // max(1, width) // TILE_ROWS * TILE_ROWS)
    if in_place and rows == 1:
        step = max(1, count)
    for first in range(0, count, step):
        last = min(count, first + step)
        if isinstance(weight, Mxfp4 | Fp8Blocks | Scaled):
            tile = _scratch.tile(last - first, width)
            weight.widen(first, last, tile)
        elif in_place:
            tile = weight[first:last]
        else:
            tile = _scratch.tile(last - first, width).copy_(weight[first:last])
        yield first, tile


def widened(weight: Weight) -> Tensor:
    """The whole in float32, stored by rows or by columns as `weight` is."""
    if isinstance(weight, Tensor):
        return weight.float()
    out = torch.empty(weight.shape)
    weight.widen(0, weight.shape[0], out)
    return out.mul_(weight.scales[:, None]) if isinstance(weight, Scaled) else out


def rows_of(weight: Weight, numbers: Sequence[int]) -> Tensor:
    """The rows of these numbers of a matrix: float32 [n, in], which may be a part of it."""
    assert isinstance(weight, Tensor | Scaled), "no family looks rows of packed weights up"
    matrix = weight.codes if isinstance(weight, Scaled) else weight
    which: slice | Tensor
    if len(numbers) == 1:  # as every token of an answer is: looking up takes half a ms
        which = slice(numbers[0], numbers[0] + 1)
    else:
        which = torch.tensor(numbers, dtype=torch.int64).to(matrix.device)
    if isinstance(weight, Tensor):
        return matrix[which].float()
    codes = matrix.view(torch.uint8)[which].view(matrix.dtype)
    return codes.float().mul_(weight.scales[which, None])
