"""The model, plainly: one process, one token after the other, from top to bottom.

This is what every fast, batched or distributed path must equal bit for bit, and what is held
against `transformers`. It shares with them the arithmetic of `numerics` and nothing else. All
tensors are float32; shapes are in the comments.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.layout import layout
from blyan_node.moe.numerics import (
    RopeTable,
    aligned,
    attention_row,
    combine,
    linear,
    rms_norm,
    rotate,
    route,
    sigmoid,
)
from blyan_node.moe.sampling import Sampler
from blyan_node.moe.weights import ReadWeights, load_part


class Reference:
    """A whole model in one process."""

    def __init__(self, config: ModelConfig, tensors: ReadWeights) -> None:
        """Loads every subject; raises `Refused` (BAD_MODEL) for what does not fit."""
        self.config = config
        self.parts: dict[str, dict[str, Tensor]] = {
            part.subject: load_part(part, tensors(part.subject)) for part in layout(config)
        }
        self.rope = RopeTable(config.rope, config.head_dim)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [tokens, vocab], and by layer the chosen experts, int64 [tokens, top_k]."""
        session = _Session(self)
        rows = [session.step(token) for token in ids]
        chosen = {
            layer: torch.stack([experts[layer] for _, experts in rows])
            for layer in range(self.config.layers)
        }
        return torch.stack([logits for logits, _ in rows]), chosen

    @torch.inference_mode()
    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        sampler: Sampler | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> list[int]:
        """At most `max_tokens` new tokens; a token of `stop` ends it and is included."""
        session, new = _Session(self), list[int]()
        sampler = sampler or Sampler()
        for token in ids:
            logits, _ = session.step(token)
        while len(new) < max_tokens:
            new.append(sampler.pick(logits))
            if new[-1] in stop:
                break
            logits, _ = session.step(new[-1])
        return new


class _Session:
    """One sequence: the keys and values of its tokens so far, by layer."""

    def __init__(self, model: Reference) -> None:
        self.model = model
        self.keys: list[list[Tensor]] = [[] for _ in range(model.config.layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(model.config.layers)]

    def step(self, token: int) -> tuple[Tensor, list[Tensor]]:
        """The next token in; its logits [vocab] and its experts [top_k] by layer out."""
        c, parts = self.model.config, self.model.parts
        embedding = parts["embed"]["embed_tokens.weight"]
        x = embedding[token : token + 1]  # [1, hidden]
        chosen = []
        for layer in range(c.layers):
            part = parts[f"layer{layer}.attention"]
            x = x + self._attention(layer, rms_norm(x, part["input_layernorm.weight"], c.norm_eps))
            seen = rms_norm(x, part["post_attention_layernorm.weight"], c.norm_eps)
            experts, weights = self._route(layer, seen)  # [1, top_k] each
            rows = [self._expert(layer, int(expert), seen) for expert in experts[0]]
            x = combine(x, weights, torch.stack(rows, dim=1))  # rows: [1, top_k, hidden]
            chosen.append(experts[0])
        x = rms_norm(x, parts["final"]["norm.weight"], c.norm_eps)
        head = embedding if c.tied else parts["head"]["lm_head.weight"]
        return linear(x, head)[0], chosen

    def _attention(self, layer: int, x: Tensor) -> Tensor:
        """x [1, hidden] → [1, hidden]; the layer's keys and values grow by one."""
        c, part = self.model.config, self.model.parts[f"layer{layer}.attention"]

        def project(name: str, x: Tensor) -> Tensor:
            weight, bias = f"self_attn.{name}_proj.weight", f"self_attn.{name}_proj.bias"
            return linear(x, part[weight], part.get(bias))

        keys, values = self.keys[layer], self.values[layer]
        cos, sin = self.model.rope.at(len(keys))
        query = rotate(project("q", x).reshape(c.heads, c.head_dim), cos, sin)
        keys.append(rotate(project("k", x).reshape(c.kv_heads, c.head_dim), cos, sin))
        values.append(project("v", x).reshape(c.kv_heads, c.head_dim))
        window = c.windows[layer] or len(keys)  # a token sees itself and window - 1 before it
        out = attention_row(
            query,  # [heads, head_dim]
            _by_head(keys[-window:]),  # [kv heads, seen, head_dim]
            _by_head(values[-window:]),
            c.head_dim**-0.5,
            part.get("self_attn.sinks"),
        )
        return project("o", out.reshape(1, -1))

    def _route(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        part, top_k = self.model.parts[f"layer{layer}.router"], self.model.config.top_k
        if self.model.config.family == "gpt_oss":
            logits = linear(x, part["router.weight"], part["router.bias"])
            return route(logits, top_k, over_chosen=True)
        return route(linear(x, part["gate.weight"]), top_k, over_chosen=False)

    def _expert(self, layer: int, expert: int, x: Tensor) -> Tensor:
        """One expert's unweighted result: x [1, hidden] → [1, hidden]."""
        c, w = self.model.config, self.model.parts[f"layer{layer}.expert{expert}"]
        if c.family == "gpt_oss":
            both = linear(x, w["gate_up_proj"].t(), w["gate_up_proj_bias"])
            gate, up = both[:, ::2], both[:, 1::2]  # interleaved
            gate = gate.clamp(max=c.swiglu_limit)
            up = up.clamp(min=-c.swiglu_limit, max=c.swiglu_limit)
            active = (up + 1) * (gate * sigmoid(gate * c.swiglu_alpha))
            return linear(active, w["down_proj"].t(), w["down_proj_bias"])
        gate, up = linear(x, w["w1.weight"]), linear(x, w["w3.weight"])
        return linear(gate * sigmoid(gate) * up, w["w2.weight"])


def _by_head(rows: list[Tensor]) -> Tensor:
    """The rows [heads, dim] of some positions as [heads, positions, dim], aligned."""
    heads, dim = rows[0].shape
    flat = aligned(heads * len(rows), dim)
    flat.copy_(torch.stack(rows, dim=1).reshape(-1, dim))
    return flat.view(heads, len(rows), dim)
