"""The arithmetic of torch on a device that has a memory of its own: a GPU.

What is held is moved there when it is loaded, and so are a session's keys and values. Rows go there
and come back: every operation takes them from wherever they are and gives its result where its
first operand was. The contract is that of every arithmetic here: a row's bits depend on the row and
the weights. Libraries choose their order of summation by the shapes and addresses that they are
given, so whatever has a sum is given one row at a time, at an aligned address, whole or in tiles
that depend on the matrix alone: the same call for a row alone and for a row among others. What has
no sum takes all rows at once. docs/devices.md says what of this has been run on which device.
"""

import hashlib
import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.numerics import Plain, Rows, aligned
from blyan_node.moe.precision import moved
from blyan_node.moe.stored import TILE_ROWS, Scaled, Weight
from blyan_node.moe.torch_errors import said
from protocols.errors import ErrorCode, Refused

log = logging.getLogger(__name__)

_TILE_FLOATS = 1 << 24  # 64 MiB: a device wants much to do at a time
_WORKSPACE_BYTES = 512 << 20  # of the device's memory for what is computed with, not held
_MODEL_CHARS, _DIGEST_CHARS = 32, 6  # of a profile's 64

P = ParamSpec("P")


def find(name: str) -> torch.device | None:
    """The device that an operator names: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`; None is the CPU.

    `auto` is the first CUDA device if it computes, or the CPU. Raises `Refused` for one that is
    not here or does not compute.
    """
    here = present()
    if name == "cpu" or (name == "auto" and "cuda:0" not in here):
        return None
    wanted = "cuda:0" if name in ("auto", "cuda") else name
    if wanted not in here:
        raise Refused(
            ErrorCode.NOT_ALLOWED,
            f"there is no device {name} on this machine",
            f"torch {torch.__version__} finds {', '.join(here)}",
            "Choose one of these, or auto.",
        )
    device = torch.device(wanted)
    why = trouble(device)
    if why is None:
        return device
    if name == "auto":
        log.warning("%s is not used: %s", device, why)
        return None
    raise Refused(
        ErrorCode.NOT_ALLOWED,
        f"nothing can be computed on {device}",
        why,
        "Choose another --device, or a build of torch that has code for this one.",
    )


def trouble(device: torch.device) -> str | None:
    """Why nothing can be computed there, if so: torch also finds what it has no code for.

    No product is tried: the first one fixes what `OnDevice` has to say before.
    """
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        return said(error)
    return None


def present() -> Sequence[str]:
    """The devices that torch finds here: `cpu`, `cuda:0`, `mps`."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(f"cuda:{number}" for number in range(count)), *mps]


class OnDevice:
    """`blyan_node.moe.arithmetic.Arithmetic`, by torch on one device."""

    aligned_bytes = 1
    recorded_by = None

    def __init__(self, device: torch.device, threads: int = 1) -> None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else sums may vary with it
        torch.backends.cuda.matmul.allow_tf32 = False  # nineteen bits are not float32
        plain = Plain(threads)
        self.device = device
        self.name = f"torch{'.'.join(torch.__version__.split('.')[:2])}-{_model(device)}-rows"
        self.add = self._there(plain.add)
        self.combine = self._there(plain.combine)
        self.swiglu = self._there(plain.swiglu)
        self.clamped = self._there(plain.clamped)
        self.sigmoid = self._there(plain.sigmoid)
        self.rms_norm = self._there(_by_row(plain.rms_norm))
        self.softmax = self._there(_by_row(plain.softmax))
        self.rotate = self._there(_rotate)
        self.attend = self._there(_attend)

    def __str__(self) -> str:
        return f"torch on {self.device} ({_model(self.device)})"

    @property
    def room_bytes(self) -> int | None:
        """What could be held on the device now; None where its memory is the machine's."""
        if self.device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(0, int(free) - _WORKSPACE_BYTES)

    def product(self, weight: Weight, bias: Tensor | None = None) -> "DeviceProduct":
        """A matrix on the device; one that lies elsewhere is copied."""
        bias = None if bias is None else bias.to(self.device).float()
        return DeviceProduct(self.device, moved(weight, self.device), bias)

    def steps(self, function: Rows) -> Rows:
        """The function with its rows on the device from beginning to end."""

        def stepped(*rows: Tensor) -> tuple[Tensor, ...]:
            results = function(*(one.to(self.device) for one in rows))
            return tuple(one.to(rows[0].device) for one in results)

        return stepped

    def _there(
        self, function: Callable[Concatenate[Tensor, P], Tensor]
    ) -> Callable[Concatenate[Tensor, P], Tensor]:
        """The function on the device; its result is where its first operand was."""

        def there(x: Tensor, /, *more: P.args, **named: P.kwargs) -> Tensor:
            operands = [self._of(one) for one in more]
            options = {name: self._of(one) for name, one in named.items()}
            return function(x.to(self.device), *operands, **options).to(x.device)  # type: ignore[arg-type]

        return there

    def _of(self, value: object) -> object:
        return value.to(self.device) if isinstance(value, Tensor) else value


class DeviceProduct:
    """A matrix and its bias, both on a device."""

    def __init__(self, device: torch.device, weight: Weight, bias: Tensor | None) -> None:
        self._device, self._weight, self._bias = device, weight, bias
        self.outs = weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows x [n, depth] times the matrix, transposed, plus its bias: float32 [n, outs]."""
        count = x.shape[0]
        rows = aligned(count, x.shape[1], self._device).copy_(x)
        out = aligned(count, self.outs, self._device)
        for first, tile in self._tiles():
            last = first + tile.shape[0]
            for row in range(count):
                torch.mv(tile, rows[row], out=out[row, first:last])
        if isinstance(self._weight, Scaled):
            out.mul_(self._weight.scales)
        if self._bias is not None:
            out.add_(self._bias)
        return out.to(x.device)

    def _tiles(self) -> Iterator[tuple[int, Tensor]]:
        """float32 pieces of the matrix, each with its first row: the same for any rows."""
        weight, (count, width) = self._weight, self._weight.shape
        if isinstance(weight, Tensor) and weight.dtype == torch.float32:
            yield 0, weight
            return
        step = max(TILE_ROWS, _TILE_FLOATS // max(1, width) // TILE_ROWS * TILE_ROWS)
        for first in range(0, count, step):
            last = min(count, first + step)
            if isinstance(weight, Tensor):
                yield first, weight[first:last].float()
            else:
                tile = torch.empty(last - first, width, device=self._device)
                weight.widen(first, last, tile)
                yield first, tile


def _by_row(
    function: Callable[Concatenate[Tensor, P], Tensor],
) -> Callable[Concatenate[Tensor, P], Tensor]:
    """The function for each row of x [n, width] by itself, at an address of its own."""

    def by_row(x: Tensor, /, *more: P.args, **named: P.kwargs) -> Tensor:
        return torch.cat([function(row.clone(), *more, **named) for row in torch.split(x, 1)])

    return by_row


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotary embedding of x [n, heads, dim], row by row by cos and sin [n, dim / 2]."""
    x = torch.cat((x[..., ::2], x[..., 1::2]), dim=-1) if interleaved else x
    return numerics.rotate(x, cos[:, None], sin[:, None])


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the last n positions: query [n, heads, dim] → [n, heads, value dim]."""
    n, seen = query.shape[0], keys.shape[1]
    rows = []
    for row in range(n):
        last = seen - n + row + 1
        here = slice(0 if window is None else max(0, last - window), last)
        rows.append(_attend_row(query[row], keys[:, here], values[:, here], scale, sinks))
    return torch.stack(rows)


def _attend_row(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    """Attention of one token: query [heads, dim] over keys [kv heads, seen, dim].

    Everything is copied, so that shapes and addresses depend on how much the token sees alone, and
    not on how large the cache has grown. Returns [heads, value dim].
    """
    (heads, dim), (kv_heads, seen) = query.shape, keys.shape[:2]
    grouped = query.clone().view(kv_heads, heads // kv_heads, dim)
    scores = torch.bmm(grouped, keys.clone().transpose(1, 2)).view(heads, seen) * scale
    if sinks is None:
        weights = torch.softmax(scores, dim=-1)
    else:
        weights = torch.softmax(torch.cat((scores, sinks[:, None]), dim=1), dim=-1)[:, :seen]
    weights = weights.contiguous().view(kv_heads, heads // kv_heads, seen)
    return torch.bmm(weights, values.clone()).view(heads, values.shape[2])


def _model(device: torch.device) -> str:
    """What its bits depend on, for the numeric profile: `cu12.8-h100-80gb-hbm3`.

    One that is too long ends with a digest of all of it: models differ in their last words, and the
    pieces into which a GPU can be cut in nothing else.
    """
    said = device.type
    if said == "cuda":
        said = f"cu{torch.version.cuda}-{torch.cuda.get_device_name(device)}"
    elif said == "mps":
        said = f"macos{platform.mac_ver()[0]}-{torch.backends.mps.get_name()}"
    plain = re.sub(r"[^a-z0-9.]+", "-", said.lower().replace("nvidia", "")).strip("-")
    if len(plain) <= _MODEL_CHARS:
        return plain
    digest = hashlib.sha256(plain.encode()).hexdigest()[:_DIGEST_CHARS]
    return f"{plain[: _MODEL_CHARS - _DIGEST_CHARS - 1]}-{digest}"
