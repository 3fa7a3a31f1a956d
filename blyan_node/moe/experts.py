"""One expert: a feed-forward network that a node holds for others."""

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.config import ModelConfig, MoeFeed
from blyan_node.moe.families import expert_layout
from blyan_node.moe.feed import FeedForward
from blyan_node.moe.weights import (
    Weights,
    by_role,
    copied_bytes,
    load_part,
    matrices,
    stored_bytes,
)
from protocols.ids import Subject, parse_subject


class Expert:
    """A loaded expert; a row's result depends on that row alone.

    `bytes` is what it takes in memory, `copied` how much of that was copied to load it.
    """

    def __init__(
        self, config: ModelConfig, subject: Subject, tensors: Weights, arithmetic: Arithmetic
    ) -> None:
        """Loads the tensors by local name; raises `Refused` (BAD_MODEL) for what does not fit."""
        layer = parse_subject(subject).layer
        assert layer is not None
        feed = config.layers[layer].feed
        assert isinstance(feed, MoeFeed)
        part = expert_layout(config, subject, tensors)
        loaded = load_part(part, tensors, arithmetic.aligned_bytes)
        self.bytes = stored_bytes(loaded)
        self.copied = copied_bytes(loaded, tensors)
        self._network = FeedForward(feed.activation, matrices(by_role(part, loaded)), arithmetic)

    @torch.inference_mode()
    def apply(self, rows: Tensor) -> Tensor:
        """The unweighted results float32 [n, hidden] of rows [n, hidden]."""
        return self._network.apply(rows)
