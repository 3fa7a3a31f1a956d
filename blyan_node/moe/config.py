"""A model's mathematics as values: sizes, and the variant of each part of each layer.

A configuration is composed: a model has layers, a layer has an attention and a feed-forward part,
and each of these is one of a few dataclasses. A family (`blyan_node.moe.families`) reads its
`config.json` into these; whatever computes asks them, and never the family's name.
"""

from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "softmax_chosen", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding. With `factor` None it is plain, else YaRN (arXiv 2309.00071)."""

    theta: float
    factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_positions: int = 0
    truncate: bool = True
    attention_factor: float = 1.0  # on cosine and sine
    score_factor: float = 1.0  # on the scale of the softmax, where a family reads mscale_all_dim


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Attention whose keys and values are shared by groups of heads (arXiv 2305.13245)."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None  # how many positions a token sees, itself included
    bias: bool = False  # on all four projections
    sinks: bool = False  # a logit for each head that takes part in the softmax and has no value
    qk_norm: Literal["head", "whole"] | None = None  # of each head, or of the whole projection
    clip: float | None = None  # bound of queries, keys and values, after the norm

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.head_dim

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """What is kept of each position: (heads, dimensions) of the keys and of the values."""
        return (self.kv_heads, self.head_dim), (self.kv_heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (arXiv 2405.04434, 2.1).

    Keys and values of all heads are made from one latent of each position, of `kv_rank`
    dimensions, and from `rope_dim` rotated ones that the heads share; only these are kept. A head's
    query and key have `plain_dim` + `rope_dim` dimensions, its value `value_dim`.
    """

    heads: int
    query_rank: int | None  # of the latent of the queries; None: they are made from the rows
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True  # pairs (2i, 2i + 1) are rotated, else (i, i + rope_dim / 2)
    bias: bool = False  # on the projections into the latents and on the last
    norm_eps: float = 1e-6  # of the norms of the latents

    @property
    def head_dim(self) -> int:
        """Dimensions of a head's queries and keys."""
        return self.plain_dim + self.rope_dim

    @property
    def window(self) -> None:
        """A token sees all that were before it."""
        return None

    @property
    def cached(self) -> tuple[tuple[int, int], ...]:
        """What is kept of each position: the normed latent and the rotated dimensions."""
        return ((1, self.kv_rank + self.rope_dim),)


@dataclass(frozen=True, slots=True)
class SiluGate:
    """silu(gate) * up."""


@dataclass(frozen=True, slots=True)
class ClampedGate:
    """(up + 1) * gate * sigmoid(alpha * gate): gate at most `limit`, up within ± `limit`."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class Routing:
    """How the router's logits become experts and weights.

    `softmax`: over all experts; `softmax_chosen`: over the chosen; `sigmoid`: each by itself.
    With `groups` > 1 only experts of the best `groups_chosen` groups may be chosen. A `correction`
    is added to the scores for choosing alone. Weights are renormalised, then multiplied by
    `scaling`.
    """

    score: Score
    renormalise: bool
    bias: bool = False
    correction: bool = False
    groups: int = 1
    groups_chosen: int = 1
    scaling: float = 1.0


Attention = GroupedAttention | LatentAttention
Activation = SiluGate | ClampedGate


@dataclass(frozen=True, slots=True)
class DenseFeed:
    """One feed-forward network for every token; the main node computes it."""

    intermediate: int
    activation: Activation


@dataclass(frozen=True, slots=True)
class MoeFeed:
    """Experts of which a router chooses `top_k` for each token.

    `shared_intermediate` > 0: an expert of that size besides, that every token passes; the main
    node computes it. `mxfp4`: the experts' matrices are stored as 4-bit floats.
    """

    experts: int
    top_k: int
    intermediate: int
    activation: Activation
    routing: Routing
    bias: bool = False  # on the projections of the experts
    shared_intermediate: int = 0
    mxfp4: bool = False


Feed = DenseFeed | MoeFeed


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One layer."""

    attention: Attention
    feed: Feed


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A whole model."""

    family: str
    vocab: int
    hidden: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    positions_max: int
    rope: Rope
    tied: bool  # the head is the embedding
    eos: tuple[int, ...]
    fp8: bool = False  # matrices but embedding, routers and head are stored as FP8 in blocks
    mtp_layers: int = 0  # layers behind the last that predict further tokens; not computed

    @property
    def context(self) -> int:
        """The most tokens of a sequence, prompt and answer together.

        `positions_max`, or what YaRN stretches the positions of the training to if that is more.
        """
        factor = self.rope.factor
        stretched = 0 if factor is None else int(self.rope.original_positions * factor)
        return max(self.positions_max, stretched)

    def experts_of(self, layer: int) -> int:
        """How many experts a layer has for others to hold: 0 if it is dense."""
        feed = self.layers[layer].feed
        return feed.experts if isinstance(feed, MoeFeed) else 0
