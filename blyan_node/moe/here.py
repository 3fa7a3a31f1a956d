"""The experts of a model that this process has at hand, as a token's steps look them up."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.experts import Expert


class Here:
    """Experts by layer and number; they are kept for as long as this is, or until `let_go`.

    `address` is a table for the steps, in which an expert is once it was asked for (`fill`).
    """

    def __init__(self, config: ModelConfig, experts: Mapping[tuple[int, int], Expert]) -> None:
        self._experts = experts
        self._hidden = config.hidden
        # By expert, one layer after another: where its steps are, or 0; the rows it has computed.
        self._first = first_places(config)
        self._table = np.zeros((self._first[-1], 2), np.int64)
        self.address = int(self._table.ctypes.data)
        for (layer, number), expert in experts.items():
            self._table[self._first[layer] + number, 0] = expert.described

    def fill(self, layer: int, numbers: Sequence[int]) -> bool:
        """Puts experts into the table; False if one is not at hand.

        For the thread that has the recorder's lock.
        """
        found = [self._experts.get((layer, number)) for number in numbers]
        for number, expert in zip(numbers, found, strict=True):
            if expert is not None:
                place = self._first[layer] + number
                self._table[place, 0] = expert.describe(self._hidden)
        return None not in found

    def compute(self, layer: int, row: Tensor, numbers: Sequence[int]) -> Tensor | None:
        """The unweighted outputs [1, top_k, hidden] of `row` [1, hidden]; None if one is not here.

        What the steps would compute, for when they cannot be made.
        """
        held = [self._experts.get((layer, number)) for number in numbers]
        found = [expert for expert in held if expert is not None]
        if len(found) < len(held):
            return None
        for number in numbers:
            self._table[self._first[layer] + number, 1] += 1
        return torch.stack([expert.apply(row) for expert in found], 1)

    def used(self) -> Iterator[tuple[int, int, int]]:
        """Which experts have computed since this was asked last: layer, number, rows."""
        rows = self._table[:, 1]
        for place in np.flatnonzero(rows).tolist():
            layer = int(np.searchsorted(self._first, place, "right")) - 1
            yield layer, place - self._first[layer], int(rows[place])
        rows[:] = 0

    def let_go(self) -> None:
        """Keeps none of them any more."""
        self._experts = {}
        self._table[:, 0] = 0


def first_places(config: ModelConfig) -> list[int]:
    """By layer the place of its first expert in a table, and at last how many there are."""
    counts = [config.experts_of(layer) for layer in range(len(config.layers))]
    return [sum(counts[:layer]) for layer in range(len(counts) + 1)]
