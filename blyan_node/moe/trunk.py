"""What the main node computes itself: embedding, attention, routing, combining, logits.

A pass goes layer by layer: `attend` gives the rows that the experts must see, whoever holds them;
`combine` takes their results. Rows of one call are consecutive positions of one session. Which rows
go together changes no bit (`blyan_node.moe.numerics`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.cache import KVCache
from blyan_node.moe.config import ModelConfig
from blyan_node.moe.layout import layout
from blyan_node.moe.weights import ReadWeights, load_part, resident_bytes
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused

PREFILL_ROWS = 32


@dataclass(frozen=True, slots=True)
class Attended:
    """One layer's rows on their way to the experts and back."""

    residual: Tensor  # [n, hidden]
    normed: Tensor  # [n, hidden]: what the experts see
    experts: Tensor  # int64 [n, top_k], the router's order
    weights: Tensor  # float32 [n, top_k]


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    output_norm: Tensor
    qkvo: tuple[Tensor, Tensor, Tensor, Tensor]
    biases: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
    sinks: Tensor | None
    router: Tensor
    router_bias: Tensor | None
    window: int | None


class Trunk:
    """The trunk and routers of one model at one root, loaded."""

    def __init__(self, config: ModelConfig, tensors: ReadWeights) -> None:
        """Loads everything but the experts; raises `Refused` (BAD_MODEL) for what does not fit."""
        self.config = config
        parts: dict[str, dict[str, Tensor]] = {}
        for part in layout(config):
            if part.kind is not Kind.EXPERT:
                parts[part.subject] = load_part(part, tensors(part.subject))
        self.bytes = sum(resident_bytes(part) for part in parts.values())
        self._embedding = parts["embed"]["embed_tokens.weight"]
        self._final_norm = parts["final"]["norm.weight"]
        self._head = self._embedding if config.tied else parts["head"]["lm_head.weight"]
        self._layers = [
            _layer(parts[f"layer{n}.attention"], parts[f"layer{n}.router"], config.windows[n])
            for n in range(config.layers)
        ]
        self._rope = numerics.RopeTable(config.rope, config.head_dim)

    def new_cache(self) -> KVCache:
        """An empty cache for one session."""
        return KVCache(self.config)

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
        return self._embedding[torch.tensor(list(ids), dtype=torch.int64)]

    @torch.inference_mode()
    def attend(self, layer: int, x: Tensor, cache: KVCache) -> Attended:
        """Attention and routing of one layer for the next rows x [n, hidden] of a session."""
        c, part = self.config, self._layers[layer]
        attended = self._attention(layer, numerics.rms_norm(x, part.input_norm, c.norm_eps), cache)
        residual = x + numerics.linear(attended, part.qkvo[3], part.biases[3])
        normed = numerics.rms_norm(residual, part.output_norm, c.norm_eps)
        logits = numerics.linear(normed, part.router, part.router_bias)
        experts, weights = numerics.route(logits, c.top_k, over_chosen=c.family == "gpt_oss")
        return Attended(residual, normed, experts, weights)

    @torch.inference_mode()
    def combine(self, attended: Attended, rows: Tensor) -> Tensor:
        """The layer's output [n, hidden] from the experts' rows [n, top_k, hidden]."""
        return numerics.combine(attended.residual, attended.weights, rows)

    @torch.inference_mode()
    def logits(self, x: Tensor) -> Tensor:
        """Logits float32 [n, vocab] of the last layer's rows x [n, hidden]."""
        normed = numerics.rms_norm(x, self._final_norm, self.config.norm_eps)
        return numerics.linear(normed, self._head)

    def _attention(self, layer: int, x: Tensor, cache: KVCache) -> Tensor:
        """Attention before the output projection: x [n, hidden] → [n, heads * head_dim]."""
        c, part, n = self.config, self._layers[layer], x.shape[0]
        q, k, v = (
            numerics.linear(x, weight, bias).reshape(n, -1, c.head_dim)
            for weight, bias in zip(part.qkvo[:3], part.biases[:3], strict=True)
        )
        start = cache.length_of(layer)
        turns = [self._rope.at(start + row) for row in range(n)]
        k = torch.stack([numerics.rotate(k[row], *turns[row]) for row in range(n)])
        cache.append(layer, k, v)
        out = numerics.aligned(n, c.heads * c.head_dim)
        for row in range(n):
            last = start + row + 1
            first = 0 if part.window is None else max(0, last - part.window)
            keys, values = cache.seen(layer, first, last)
            query = numerics.rotate(q[row], *turns[row])
            seen = numerics.attention_row(query, keys, values, c.head_dim**-0.5, part.sinks)
            out[row] = seen.reshape(-1)
        return out


def _layer(attention: dict[str, Tensor], router: dict[str, Tensor], window: int | None) -> _Layer:
    projections = [f"self_attn.{name}_proj" for name in "qkvo"]
    q, k, v, o = (attention[f"{name}.weight"] for name in projections)
    bq, bk, bv, bo = (attention.get(f"{name}.bias") for name in projections)
    return _Layer(
        input_norm=attention["input_layernorm.weight"],
        output_norm=attention["post_attention_layernorm.weight"],
        qkvo=(q, k, v, o),
        biases=(bq, bk, bv, bo),
        sinks=attention.get("self_attn.sinks"),
        router=router["router.weight"] if "router.weight" in router else router["gate.weight"],
        router_bias=router.get("router.bias"),
        window=window,
    )
