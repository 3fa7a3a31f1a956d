"""The keys and values of the tokens that a session has seen."""

import torch
from torch import Tensor

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.numerics import ALIGNED_FLOATS

_FIRST_POSITIONS = 256


class KVCache:
    """Keys and values by layer, each [heads, positions, dim] as the layer's attention says.

    Buffers double when they are full.

    Each layer has its own length, so a pass that was cut off in the middle can be undone with
    `truncate` and done again.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._sizes = [layer.attention.cached for layer in config.layers]
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * len(config.layers)
        self._lengths = [0] * len(config.layers)

    @property
    def length(self) -> int:
        """Positions that every layer has seen."""
        return min(self._lengths)

    @property
    def bytes(self) -> int:
        """Memory of all buffers."""
        pairs = [pair for pair in self._buffers if pair is not None]
        return sum(t.numel() * t.element_size() for pair in pairs for t in pair)

    def length_of(self, layer: int) -> int:
        """Positions that one layer has seen."""
        return self._lengths[layer]

    def truncate(self, length: int) -> None:
        """Forgets every position from `length` on."""
        self._lengths = [min(known, length) for known in self._lengths]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Adds keys and values, each [n, heads, dim], of the next n positions of a layer."""
        first = self._lengths[layer]
        last = first + keys.shape[0]
        for buffer, new in zip(self._room(layer, last), (keys, values), strict=True):
            buffer[:, first:last, : new.shape[2]] = new.transpose(0, 1)
        self._lengths[layer] = last

    def seen(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions [first, last), each [heads, positions, dim]."""
        pair, sizes = self._buffers[layer], self._sizes[layer]
        assert pair is not None and last <= self._lengths[layer]
        return pair[0][:, first:last, : sizes[0][1]], pair[1][:, first:last, : sizes[1][1]]

    def _room(self, layer: int, positions: int) -> tuple[Tensor, Tensor]:
        pair = self._buffers[layer]
        room = 0 if pair is None else pair[0].shape[1]
        if pair is not None and positions <= room:
            return pair
        room = max(_FIRST_POSITIONS, room)
        while room < positions:
            room *= 2
        keys, values = self._sizes[layer]
        grown = _empty(*keys, room), _empty(*values, room)
        if pair is not None:
            known = self._lengths[layer]
            for new, old in zip(grown, pair, strict=True):
                new[:, :known] = old[:, :known]
        self._buffers[layer] = grown
        return grown


def _empty(heads: int, dim: int, positions: int) -> Tensor:
    return torch.zeros(heads, positions, -(-dim // ALIGNED_FLOATS) * ALIGNED_FLOATS)
