"""A token's way through a whole model as steps that are recorded once (`walking`)."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from blyan_node.moe.kernels.attention import FIELDS as TASK
from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.walking import NOW

_NO_WINDOW = 1 << 62
_PLACE, _COUNT = ctypes.c_void_p, ctypes.c_int64


class Now(ctypes.Structure):
    """What differs from token to token."""

    _fields_ = [(name, ctypes.c_int64) for name in NOW]


class _Task(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in TASK]


class Program:
    """Steps, and what they read; `recording` begins and ends what is recorded.

    The functions record a step and call nothing; so do those of `kernels` meanwhile. All results
    are valid until the next token, those of a layer until the next layer (`layer`).
    """

    def __init__(self, kernels: Kernels) -> None:
        self.now = Now()
        self.score_heads = 0  # the most query heads that any step attends with
        self._kernels = kernels
        self._walk = kernels.kernel("walk", _PLACE, _PLACE, _COUNT, _COUNT).call
        self._here = ctypes.addressof(self.now)
        self._parts: list[tuple[int, str]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What is called within becomes the program. The thread has the recorder's lock."""
        with self._kernels.recorder.program() as self._recording:
            yield
        self.count = self._recording.count

    def walk(self, first: int, last: int) -> int | None:
        """Makes the steps from `first` to `last`; the number of one that cannot be made."""
        self.now.stopped = 0
        self._walk(self._here, self._recording.place, first, last)
        return self.now.reached if self.now.stopped else None

    @property
    def next(self) -> int:
        """The number of the next step."""
        return self._recording.count

    def part(self, name: str) -> None:
        """Names what is recorded from here on, for those who measure."""
        self._parts.append((self.next, name))

    def parts(self) -> Iterator[tuple[int, int, str]]:
        """The named spans of steps: first, last, name."""
        ends = [first for first, _ in self._parts[1:]] + [self.count]
        for (first, name), last in zip(self._parts, ends, strict=True):
            yield first, last, name

    def layer(self) -> None:
        """Begins a layer: it may take the memory of what was recorded before."""
        self._recording.again()

    def empty(self, *shape: int) -> Tensor:
        """Room for a result, float32."""
        return self._recording.empty(*shape)

    def copy(self, out: Tensor, x: Tensor) -> None:
        """out = x, of one shape."""
        assert out.is_contiguous() and x.is_contiguous() and out.shape == x.shape
        self._add("copy", out.data_ptr(), x.data_ptr(), x.numel(), kept=out)

    def clip(self, x: Tensor, bound: float) -> None:
        """Bounds x by ± `bound` where it is."""
        assert x.is_contiguous()
        self._add("clip", x.data_ptr(), x.numel(), float(bound))

    def turn(self, x: Tensor, out: Tensor | None = None, *, interleaved: bool = False) -> Tensor:
        """Rotary embedding of x [heads, dim] for the token's position (`Kernels.rotate`)."""
        (heads, dim), out = x.shape, self.empty(*x.shape) if out is None else out
        strides = (4 * out.stride(0), 4 * x.stride(0))
        name = "turn_pairs" if interleaved else "turn_halves"
        assert out.shape == x.shape and out.stride(1) == x.stride(1) == 1
        self._add(name, self._here, out.data_ptr(), x.data_ptr(), dim // 2, heads, *strides)
        return out

    def keep(self, slot: int, stride: int, x: Tensor, first: int = 0) -> None:
        """Writes x [heads, dim] to a slot of the cache, from dimension `first` on.

        A position has `stride` bytes.
        """
        heads, dim = x.shape
        assert x.stride(1) == 1
        given = (slot, stride, 4 * first, x.data_ptr(), 4 * x.stride(0), dim, heads)
        self._add("keep", self._here, *given)

    def attend(
        self,
        query: Tensor,
        keys: tuple[int, int],
        values: tuple[int, int, int],
        kv_heads: int,
        scale: float,
        *,
        window: int | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [heads, dim] over the cache: [heads, value dim].

        `keys` are a slot and the bytes of a position, `values` these and the value's dimensions.
        """
        (heads, dim), (slot, key_stride) = query.shape, keys
        value_slot, value_stride, value_dim = values
        out, factor = self.empty(heads, value_dim), ctypes.c_float(scale)
        task = _Task(
            query=query.data_ptr(), query_stride=4 * query.stride(0),
            out=out.data_ptr(), out_stride=4 * value_dim,
            keys_stride=key_stride, values_stride=value_stride,
            scale=ctypes.addressof(factor), sinks=0 if sinks is None else sinks.data_ptr(),
            group=heads // kv_heads, parts=1, rows=1, window=window or _NO_WINDOW,
            dim=dim, value_dim=value_dim,
        )  # fmt: skip
        self.score_heads = max(self.score_heads, heads)
        given = (ctypes.addressof(task), slot, value_slot, kv_heads)
        self._add("look", self._here, *given, kept=(task, factor, sinks))
        return out

    def route(
        self,
        variant: str,
        logits: Tensor,
        ranks: int,
        *more: int | float,
        kept: object = None,
    ) -> tuple[Tensor, Tensor]:
        """Experts int64 [1, ranks] and their weights, from logits [1, experts]: `choosing`.

        `more` is what this variant is given.
        """
        count = logits.shape[1]
        experts = self.empty(1, 2 * ranks).view(torch.int64)
        weights, scores, keys = self.empty(1, ranks), self.empty(count), self.empty(2 * count)
        places = (x.data_ptr() for x in (experts, weights, scores, keys))
        self._add(f"route_{variant}", logits.data_ptr(), count, ranks, *places, *more, kept=kept)
        return experts, weights

    def experts(self, first: int, chosen: Tensor, x: Tensor) -> Tensor:
        """The rows [1, ranks, width] of the chosen experts for x [1, width].

        `first` is the number of the place of the layer's expert 0. The program stops here if one
        of them is not at hand.
        """
        ranks, width = chosen.shape[1], x.shape[1]
        out = self.empty(1, ranks, width)
        given = (first, chosen.data_ptr(), ranks, x.data_ptr(), out.data_ptr())
        self._add("experts", self._here, *given)
        return out

    def _add(self, name: str, *given: int | float, kept: object = None) -> None:
        kernel = self._kernels.kernel(name)
        self._recording.add(kernel.address, given, _unshared, kept)


def _unshared() -> None:
    """Programs are made on one thread."""
    raise AssertionError
