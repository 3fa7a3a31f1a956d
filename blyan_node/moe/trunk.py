"""What the main node computes itself: embedding, attention, routing, combining, logits.

A pass goes layer by layer: `attend` gives the rows that the experts must see, whoever holds them;
`combine` takes their results. A dense layer, and the shared experts of another, are computed here.
Rows of one call are consecutive positions of one session. Which rows go together changes no bit
(`blyan_node.moe.arithmetic`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic, Product
from blyan_node.moe.attention import Grouped
from blyan_node.moe.cache import KVCache, bytes_of
from blyan_node.moe.config import (
    DenseFeed,
    Feed,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoeFeed,
)
from blyan_node.moe.families import layout
from blyan_node.moe.feed import FeedForward
from blyan_node.moe.latent import Latent
from blyan_node.moe.rope import RopeTable
from blyan_node.moe.routing import combine, route
from blyan_node.moe.stored import Weight
from blyan_node.moe.weights import (
    ReadWeights,
    by_role,
    copied_bytes,
    load_part,
    matrices,
    stored_bytes,
    vector,
)
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused

PREFILL_ROWS = 32
Parts = dict[str, dict[str, Weight]]


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


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    output_norm: Tensor
    attend: Callable[[int, Tensor, KVCache], Tensor]
    feed: Feed
    router: Product | None  # None in a dense layer
    correction: Tensor | None  # of the router
    network: FeedForward | None  # of a dense layer, or the shared experts


class Trunk:
    """The trunk and routers of one model at one root, loaded."""

    def __init__(self, config: ModelConfig, tensors: ReadWeights, arithmetic: Arithmetic) -> None:
        """Loads everything but the experts; raises `Refused` (BAD_MODEL) for what does not fit."""
        self.config = config
        self._arithmetic = arithmetic
        self.bytes = self.copied = 0
        parts: Parts = {}
        for part in layout(config):
            if part.kind is not Kind.EXPERT:
                given = tensors(part.subject)
                loaded = load_part(part, given, arithmetic.aligned_bytes)
                self.bytes += stored_bytes(loaded)
                self.copied += copied_bytes(loaded, given)
                parts[part.subject] = matrices(by_role(part, loaded))
        embedding = parts["embed"]["weight"]
        assert isinstance(embedding, Tensor)
        self._embedding = embedding
        self._final_norm = _norm(parts["final"], "weight")
        self._head = arithmetic.product(embedding if config.tied else parts["head"]["weight"])
        self._ropes: dict[int, RopeTable] = {}
        self._layers = [self._layer(n, one, parts) for n, one in enumerate(config.layers)]

    def _layer(self, number: int, layer: LayerConfig, parts: Parts) -> _Layer:
        given, feed, arithmetic = parts[f"layer{number}.attention"], layer.feed, self._arithmetic
        dim = layer.attention.rope_dim
        if dim not in self._ropes:
            self._ropes[dim] = RopeTable(self.config.rope, dim)
        rope, attention = self._ropes[dim], layer.attention
        loaded: Grouped | Latent
        if isinstance(attention, LatentAttention):
            loaded = Latent(attention, given, rope, arithmetic)
        else:
            loaded = Grouped(attention, given, rope, self.config.norm_eps, arithmetic)
        here = f"layer{number}.mlp" if isinstance(feed, DenseFeed) else f"layer{number}.shared"
        router = parts.get(f"layer{number}.router")
        return _Layer(
            input_norm=_norm(given, "input_norm"),
            output_norm=_norm(given, "output_norm"),
            attend=loaded.apply,
            feed=feed,
            router=router and arithmetic.product(router["weight"], vector(router, "bias")),
            correction=router and vector(router, "correction"),
            network=FeedForward(feed.activation, parts[here], arithmetic)
            if here in parts
            else None,
        )

    def new_cache(self, positions: int | None = None) -> KVCache:
        """An empty cache for one session, with room for so many positions."""
        return KVCache(self.config) if positions is None else KVCache(self.config, positions)

    def cache_bytes(self, positions: int) -> int:
        """The memory of such a cache."""
        return bytes_of(self.config, positions)

    @staticmethod
    def prefill_cuts(start: int, count: int) -> list[tuple[int, int]]:
        """Cuts the positions [start, start + count) at multiples of `PREFILL_ROWS`."""
        cuts, end = [], start + count
        while start < end:
            cut = min(end, (start // PREFILL_ROWS + 1) * PREFILL_ROWS)
            cuts.append((start, cut))
            start = cut
        return cuts

    @torch.inference_mode()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """The rows [n, hidden] of n token ids; raises `Refused` (BAD_INPUT) for unknown ids."""
        for one in ids:
            if not 0 <= one < self.config.vocab:
                raise Refused(
                    ErrorCode.BAD_INPUT,
                    f"token id {one}",
                    f"the model's vocabulary has {self.config.vocab} tokens",
                )
        return self._embedding[torch.tensor(list(ids), dtype=torch.int64)].float()

    @torch.inference_mode()
    def attend(self, layer: int, x: Tensor, cache: KVCache) -> Attended:
        """Attention and routing of one layer for the next rows x [n, hidden] of a session."""
        eps, part, arithmetic = self.config.norm_eps, self._layers[layer], self._arithmetic
        residual = x + part.attend(layer, arithmetic.rms_norm(x, part.input_norm, eps), cache)
        normed = arithmetic.rms_norm(residual, part.output_norm, eps)
        here = None if part.network is None else part.network.apply(normed)
        if isinstance(part.feed, MoeFeed):
            assert part.router is not None
            logits, feed = part.router(normed), part.feed
            chosen = route(arithmetic, logits, feed.top_k, feed.routing, part.correction)
            return Attended(layer, residual, Routed(normed, *chosen), here)
        assert here is not None
        return Attended(layer, residual + here, None)

    @torch.inference_mode()
    def walk(self, layer: int, x: Tensor, cache: KVCache) -> Attended:
        """As `attend` from `layer` on, through dense layers, to the next layer with experts.

        If none is left, `residual` is the output of the last layer, and `layer` their number.
        """
        while layer < len(self._layers):
            attended = self.attend(layer, x, cache)
            if attended.routed is not None:
                return attended
            layer, x = layer + 1, attended.residual
        return Attended(layer, x, None)

    @torch.inference_mode()
    def combine(self, attended: Attended, rows: Tensor) -> Tensor:
        """The layer's output [n, hidden] from the experts' rows [n, top_k, hidden].

        The sum's order: (residual + experts in ascending rank) + shared experts.
        """
        assert attended.routed is not None
        out = combine(attended.residual, attended.routed.weights, rows)
        return out if attended.shared is None else out + attended.shared

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [n, vocab] of the last layer's rows x [n, hidden]."""
        return self._head(self._arithmetic.rms_norm(x, self._final_norm, self.config.norm_eps))


def _norm(tensors: dict[str, Weight], role: str) -> Tensor:
    """A norm's weights, which every layer has."""
    weight = vector(tensors, role)
    assert weight is not None
    return weight
