"""One expert: a feed-forward network that a node holds for others."""

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.config import ModelConfig, MoeFeed
from blyan_node.moe.families import expert_layout
from blyan_node.moe.feed import FeedForward
from blyan_node.moe.precision import hold
from blyan_node.moe.weights import Weights
from protocols.ids import Subject, parse_subject
from protocols.precision import PUBLISHED, Precision


class Expert:
    """A loaded expert; a row's result depends on that row alone.

    `bytes` is what it takes in memory, `copied` how much of that was copied to load it, `storage`
    how its matrices lie. One that was `converted` needs no file of what was published any more.
    """

    def __init__(
        self,
        config: ModelConfig,
        subject: Subject,
        tensors: Weights,
        arithmetic: Arithmetic,
        precision: Precision = PUBLISHED,
    ) -> None:
        """Loads the tensors by local name; raises `Refused` (BAD_MODEL) for what does not fit."""
        layer = parse_subject(subject).layer
        assert layer is not None
        feed = config.layers[layer].feed
        assert isinstance(feed, MoeFeed)
        part = expert_layout(config, subject, tensors)
        held = hold(part, tensors, precision, arithmetic.aligned_bytes, arithmetic.device)
        self.bytes, self.copied, self.converted = held.bytes, held.copied, held.converted
        self.storage = held.storage
        self._network = FeedForward(feed.activation, held.tensors, arithmetic)

    @torch.inference_mode()
    def apply(self, rows: Tensor) -> Tensor:
        """The unweighted results float32 [n, hidden] of rows [n, hidden]."""
        return self._network.apply(rows)

    @property
    def described(self) -> int:
        """What `describe` has given, or 0."""
        return self._network.described

    def describe(self, hidden: int) -> int:
        """The address of its steps for one row [1, hidden]; there for as long as the expert.

        For the thread that has the recorder's lock, where the arithmetic is recorded.
        """
        return self._network.describe(hidden)
