"""One layer as the trunk computes it, and its rows between two pieces of that."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from blyan_node.moe.arithmetic import Rows
from blyan_node.moe.attention import Grouped
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import Feed
from blyan_node.moe.latent import Latent


@dataclass(frozen=True, slots=True)
class Routed:
    """What goes to the experts of a layer, whoever holds them."""

    normed: Tensor  # [n, hidden]: what they see
    experts: Tensor  # int64 [n, top_k], the router's order
    weights: Tensor  # float32 [n, top_k]


@dataclass(frozen=True, slots=True)
class Attended:
    """One layer's rows. With `routed` None the layer is dense and `residual` is its output."""

    layer: int
    residual: Tensor  # [n, hidden]
    routed: Routed | None
    shared: Tensor | None = None  # [n, hidden]: of the experts that every token passes


# A layer that waits for its experts, or logits [n, vocab], or None where none are wanted.
Passed = Attended | Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer in three pieces; the one in the middle needs the positions before."""

    before: Rows  # x → what goes into the attention
    attention: Grouped | Latent
    after: Rows  # x and what was mixed → output; or residual, normed, logits, shared experts
    feed: Feed
    correction: Tensor | None  # of the router

    def mix(self, number: int, projected: Sequence[Tensor], cache: KVCache) -> Tensor:
        """The piece in the middle."""
        return self.attention.mix(number, projected, cache)
