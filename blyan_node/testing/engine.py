"""A whole model in one process by the paths that services use: trunk, cache and single experts."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import ModelConfig
from blyan_node.moe.experts import Expert
from blyan_node.moe.families import layout
from blyan_node.moe.layer import Routed
from blyan_node.moe.trunk import Trunk
from blyan_node.moe.weights import ReadWeights
from blyan_node.testing.arithmetic import best
from protocols.dag.header import Kind
from protocols.ids import expert_subject
from protocols.precision import PUBLISHED, Precision


class Engine:
    """Trunk and experts of one model; experts see rows in groups that a `Random` composes."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: ReadWeights,
        arithmetic: Arithmetic | None = None,
        precision: Precision = PUBLISHED,
    ) -> None:
        """With the best arithmetic that this machine has unless one is given."""
        self.config = config
        arithmetic = arithmetic or best()
        self.trunk = Trunk(config, tensors, arithmetic, precision)
        self.experts = {
            part.subject: Expert(config, part.subject, tensors(part.subject), arithmetic, precision)
            for part in layout(config)
            if part.kind is Kind.EXPERT
        }

    def experts_by_place(self) -> dict[tuple[int, int], Expert]:
        """Them all by layer and number."""
        return {
            (layer, number): self.experts[expert_subject(layer, number)]
            for layer in range(len(self.config.layers))
            for number in range(self.config.experts_of(layer))
        }

    def forward(
        self, requests: Sequence[tuple[KVCache, Sequence[int]]], composed: random.Random
    ) -> list[Tensor]:
        """Logits of the next tokens of several requests, whose rows meet at the experts."""
        states = [self.trunk.embed(ids) for _, ids in requests]
        for layer in range(len(self.config.layers)):
            attended = [
                self.trunk.attend(layer, x, cache)
                for x, (cache, _) in zip(states, requests, strict=True)
            ]
            routed = [one.routed for one in attended if one.routed is not None]
            if not routed:
                states = [one.residual for one in attended]
                continue
            rows = self._experts(layer, routed, composed)
            states = [self.trunk.combine(one, out) for one, out in zip(attended, rows, strict=True)]
        return [self.trunk.logits(x) for x in states]

    def _experts(
        self, layer: int, routed: Sequence[Routed], composed: random.Random
    ) -> list[Tensor]:
        results = [torch.empty(*one.experts.shape, self.config.hidden) for one in routed]
        for number in range(self.config.experts_of(layer)):
            places = [
                (request, int(row), int(rank))
                for request, one in enumerate(routed)
                for row, rank in (one.experts == number).nonzero()
            ]
            composed.shuffle(places)
            expert = self.experts[expert_subject(layer, number)]
            while places:
                count = composed.randint(1, len(places))
                batch, places = places[:count], places[count:]
                rows = torch.stack([routed[request].normed[row] for request, row, _ in batch])
                for place, result in zip(batch, expert.apply(rows), strict=True):
                    request, row, rank = place
                    results[request][row, rank] = result
        return results
