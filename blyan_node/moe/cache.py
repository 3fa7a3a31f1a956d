"""The keys and values of the tokens that a session has seen."""

import torch
from torch import Tensor

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.numerics import ALIGNED_FLOATS

_FIRST_POSITIONS = 256


class KVCache:
    """Keys and values by layer, [kv heads, positions, head_dim], in buffers that double.

    Each layer has its own length, so a pass that was cut off in the middle can be undone with
    `truncate` and done again.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._heads, self._dim = config.kv_heads, config.head_dim
        self._stride = -(-self._dim // ALIGNED_FLOATS) * ALIGNED_FLOATS
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * config.layers
        self._lengths = [0] * config.layers

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
        """Adds keys and values [n, kv heads, head_dim] of the next n positions of a layer."""
        first = self._lengths[layer]
        last = first + keys.shape[0]
        pair = self._room(layer, last)
        pair[0][:, first:last, : self._dim] = keys.transpose(0, 1)
        pair[1][:, first:last, : self._dim] = values.transpose(0, 1)
        self._lengths[layer] = last

    def seen(self, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions [first, last): [kv heads, positions, head_dim]."""
        pair = self._buffers[layer]
        assert pair is not None and last <= self._lengths[layer]
        return pair[0][:, first:last, : self._dim], pair[1][:, first:last, : self._dim]

    def _room(self, layer: int, positions: int) -> tuple[Tensor, Tensor]:
        pair = self._buffers[layer]
        room = 0 if pair is None else pair[0].shape[1]
        if pair is not None and positions <= room:
            return pair
        room = max(_FIRST_POSITIONS, room)
        while room < positions:
            room *= 2
        grown = (
            torch.zeros(self._heads, room, self._stride),
            torch.zeros(self._heads, room, self._stride),
        )
        if pair is not None:
            known = self._lengths[layer]
            for new, old in zip(grown, pair, strict=True):
                new[:, :known] = old[:, :known]
        self._buffers[layer] = grown
        return grown
