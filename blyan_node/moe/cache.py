"""What a session keeps of the tokens that it has seen: keys and values, or what makes them."""

import ctypes

import torch
from torch import Tensor

from blyan_node.moe.config import ModelConfig

ALIGNED_FLOATS = 16  # products by torch want rows at multiples of 64 bytes
_FIRST_POSITIONS = 256


class KVCache:
    """By layer what its attention keeps (`cached`): buffers [heads, positions, dim].

    They have room for `positions` from the beginning (memory is taken as it is written to), and
    double when they are full. Each layer has its own length, so a pass that was cut off in the
    middle can be undone with `truncate` and done again. They are on `device`, or in our memory.
    """

    def __init__(
        self,
        config: ModelConfig,
        positions: int = _FIRST_POSITIONS,
        device: torch.device | None = None,
    ) -> None:
        self._positions, self._device = positions, device
        self._sizes = [layer.attention.cached for layer in config.layers]
        self._buffers: list[tuple[Tensor, ...] | None] = [None] * len(config.layers)
        self._lengths = [0] * len(config.layers)
        self._room_of_all = 0  # that every layer had when the addresses were written
        self._addresses = (ctypes.c_int64 * (2 * sum(map(len, self._sizes))))()

    @property
    def length(self) -> int:
        """Positions that every layer has seen."""
        return min(self._lengths)

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        known = [buffers for buffers in self._buffers if buffers is not None]
        return sum(t.numel() * t.element_size() for buffers in known for t in buffers)

    def length_of(self, layer: int) -> int:
        """Positions that one layer has seen."""
        return self._lengths[layer]

    def truncate(self, length: int) -> None:
        """Forgets every position from `length` on."""
        self._lengths = [min(known, length) for known in self._lengths]

    def append(self, layer: int, *rows: Tensor) -> None:
        """Adds rows, for each buffer [n, heads, dim], of the next n positions of a layer."""
        first = self._lengths[layer]
        last = first + rows[0].shape[0]
        for buffer, new in zip(self._room(layer, last), rows, strict=True):
            buffer[:, first:last, : new.shape[2]] = new.transpose(0, 1)
        self._lengths[layer] = last

    def seen(self, layer: int, first: int, last: int) -> tuple[Tensor, ...]:
        """The positions [first, last) of a layer's buffers, each [heads, positions, dim]."""
        buffers = self._buffers[layer]
        assert buffers is not None and last <= self._lengths[layer]
        return tuple(
            buffer[:, first:last, :dim]
            for buffer, (_, dim) in zip(buffers, self._sizes[layer], strict=True)
        )

    def addresses(self, positions: int) -> int:
        """Where the buffers are, with room for so many positions: the address of a table.

        By layer and buffer it has the address and the bytes from a head to the next (`walking`).
        """
        if positions > self._room_of_all:
            rooms = [self._room(layer, positions) for layer in range(len(self._sizes))]
            buffers = [buffer for of_layer in rooms for buffer in of_layer]
            for number, buffer in enumerate(buffers):
                self._addresses[2 * number] = buffer.data_ptr()
                self._addresses[2 * number + 1] = 4 * buffer.stride(0)
            self._room_of_all = min(buffer.shape[1] for buffer in buffers)
        return ctypes.addressof(self._addresses)

    def appended(self, first: int, last: int, length: int) -> None:
        """Layers from `first` up to `last` have seen `length` positions: written by `addresses`."""
        self._lengths[first:last] = [length] * (last - first)

    def _room(self, layer: int, positions: int) -> tuple[Tensor, ...]:
        buffers = self._buffers[layer]
        room = 0 if buffers is None else buffers[0].shape[1]
        if buffers is not None and positions <= room:
            return buffers
        room = max(self._positions, room)
        while room < positions:
            room *= 2
        grown = tuple(_empty(heads, dim, room, self._device) for heads, dim in self._sizes[layer])
        if buffers is not None:
            known = self._lengths[layer]
            for new, old in zip(grown, buffers, strict=True):
                new[:, :known] = old[:, :known]
        self._buffers[layer] = grown
        self._room_of_all = 0  # the addresses written are of the buffers before
        return grown


def bytes_of(config: ModelConfig, positions: int) -> int:
    """The memory of a cache with room for `positions`."""
    sizes = (size for layer in config.layers for size in layer.attention.cached)
    return sum(4 * heads * _stride(dim) for heads, dim in sizes) * positions


def _empty(heads: int, dim: int, positions: int, device: torch.device | None) -> Tensor:
    return torch.empty(heads, positions, _stride(dim), device=device)


def stride_bytes(dim: int) -> int:
    """The bytes from one position to the next where a position has so many float32."""
    return 4 * _stride(dim)


def _stride(dim: int) -> int:
    return -(-dim // ALIGNED_FLOATS) * ALIGNED_FLOATS
