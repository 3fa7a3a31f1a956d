"""The model, plainly: one process, one token after the other, from top to bottom.

This is what every fast, batched or distributed path must equal bit for bit, and what is held
against `transformers`. It shares with them the arithmetic that it is given, the angles of `rope`
and the choices of `routing`, and nothing else. All tensors are float32; shapes are in the comments.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.config import (
    Activation,
    ClampedGate,
    DenseFeed,
    GroupedAttention,
    LatentAttention,
    ModelConfig,
    MoeFeed,
)
from blyan_node.moe.families import expert_layout, layout
from blyan_node.moe.numerics import aligned
from blyan_node.moe.precision import hold
from blyan_node.moe.rope import RopeTable
from blyan_node.moe.routing import route
from blyan_node.moe.sampling import Sampler
from blyan_node.moe.stored import Mxfp4, Scaled, Weight, widened
from blyan_node.moe.weights import ReadWeights
from protocols.dag.header import Kind
from protocols.precision import PUBLISHED, Precision

Weights = Mapping[str, Tensor]  # by role (`blyan_node.moe.layout`)


class Reference:
    """A whole model in one process."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: ReadWeights,
        arithmetic: Arithmetic,
        precision: Precision = PUBLISHED,
    ) -> None:
        """Loads every subject; raises `Refused` (BAD_MODEL) for what does not fit."""
        self.config = config
        self.arithmetic = arithmetic
        self.parts: dict[str, dict[str, Tensor]] = {}
        for part in layout(config):
            given = tensors(part.subject)
            if part.kind is Kind.EXPERT:
                part = expert_layout(config, part.subject, given)
            self.parts[part.subject] = _floats(hold(part, given, precision).tensors)

    @torch.inference_mode()
    def forward(self, ids: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [tokens, vocab], and by layer the chosen experts, int64 [tokens, top_k]."""
        session = _Session(self)
        rows = [session.step(token) for token in ids]
        chosen = {
            layer: torch.stack([experts[layer] for _, experts in rows]) for layer in rows[0][1]
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
        sampler.see(ids)
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
        self.model, self.rules = model, model.arithmetic
        self.keys: list[list[Tensor]] = [[] for _ in model.config.layers]
        self.values: list[list[Tensor]] = [[] for _ in model.config.layers]
        dims = {layer.attention.rope_dim for layer in model.config.layers}
        self.ropes = {dim: RopeTable(model.config.rope, dim) for dim in dims}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [n, k] times weight [m, k], transposed, plus bias [m]: [n, m]."""
        return self.rules.product(weight, bias)(x)

    def apply(self, x: Tensor, part: Weights, role: str) -> Tensor:
        """x [n, k] times the matrix of a role, its scales if it has any, plus its bias: [n, m]."""
        bias, scales = (
            part.get(f"{role.removesuffix('_interleaved')}_bias"),
            part.get(_scales(role)),
        )
        if scales is None:
            return self.linear(x, part[role], bias)
        # Whole numbers have sums of their own.
        if part[role].dtype == torch.int8:
            return self.rules.product(Scaled(part[role], scales), bias)(x)
        if part[role].dtype == torch.uint8:
            return self.rules.product(Mxfp4(part[role], scales, whole_rows=True), bias)(x)
        out = self.linear(x, part[role]) * scales
        return out if bias is None else out + bias

    def step(self, token: int) -> tuple[Tensor, dict[int, Tensor]]:
        """The next token in; its logits [vocab] and its experts [top_k] by layer out."""
        c, parts = self.model.config, self.model.parts
        embedding = parts["embed"]
        x = embedding["weight"][token : token + 1].float()  # [1, hidden]
        if _scales("weight") in embedding:
            x = x * embedding[_scales("weight")][token]
        chosen = {}
        for layer, one in enumerate(c.layers):
            part, rope = parts[f"layer{layer}.attention"], self.ropes[one.attention.rope_dim]
            seen = self.rules.rms_norm(x, part["input_norm"], c.norm_eps)
            if isinstance(one.attention, LatentAttention):
                x = self.rules.add(x, self._latent(layer, one.attention, rope, seen))
            else:
                x = self.rules.add(x, self._attention(layer, one.attention, rope, seen))
            seen = self.rules.rms_norm(x, part["output_norm"], c.norm_eps)
            if isinstance(one.feed, DenseFeed):
                dense = parts[f"layer{layer}.mlp"]
                x = self.rules.add(x, self._feed_forward(one.feed.activation, dense, seen))
            else:
                x, chosen[layer] = self._experts(layer, one.feed, x, seen)
        x = self.rules.rms_norm(x, parts["final"]["weight"], c.norm_eps)
        head = embedding if c.tied else parts["head"]
        return self.apply(x, head, "weight")[0], chosen

    def _attention(self, layer: int, c: GroupedAttention, rope: RopeTable, x: Tensor) -> Tensor:
        """x [1, hidden] → [1, hidden]; the layer's keys and values grow by one."""
        part, eps = self.model.parts[f"layer{layer}.attention"], self.model.config.norm_eps

        def project(name: str) -> Tensor:  # [heads, head_dim]
            rows = self.apply(x, part, name)
            if c.qk_norm == "whole" and f"{name}_norm" in part:
                rows = self.rules.rms_norm(rows, part[f"{name}_norm"], eps)
            heads = rows.reshape(-1, c.head_dim)
            if c.qk_norm == "head" and f"{name}_norm" in part:
                heads = self.rules.rms_norm(heads, part[f"{name}_norm"], eps)
            return heads if c.clip is None else heads.clamp(-c.clip, c.clip)

        keys, values = self.keys[layer], self.values[layer]
        turn = rope.rows(len(keys), len(keys) + 1)  # cos and sin [1, head_dim / 2]
        query = self.rules.rotate(project("q")[None], *turn)
        keys.append(self.rules.rotate(project("k")[None], *turn)[0])
        values.append(project("v"))
        window = c.window or len(keys)  # a token sees itself and window - 1 before it
        out = self.rules.attend(
            query,  # [1, heads, head_dim]
            _by_head(keys[-window:]),  # [kv heads, seen, head_dim]
            _by_head(values[-window:]),
            1.0 / math.sqrt(c.head_dim),
            sinks=part.get("sinks"),
        )
        return self.apply(out.reshape(1, -1), part, "o")

    def _latent(self, layer: int, c: LatentAttention, rope: RopeTable, x: Tensor) -> Tensor:
        """x [1, hidden] → [1, hidden]; the layer's latents, in `keys`, grow by one."""
        part, latents = self.model.parts[f"layer{layer}.attention"], self.keys[layer]
        turn = rope.rows(len(latents), len(latents) + 1)

        def turned(rows: Tensor) -> Tensor:  # [n, rope_dim]
            return self.rules.rotate(rows[None], *turn, interleaved=c.interleaved)[0]

        row = self.apply(x, part, "kv_a")  # [1, kv_rank + rope_dim]
        latent, key = row[:, : c.kv_rank], row[:, c.kv_rank :]
        latent = self.rules.rms_norm(latent, part["kv_a_norm"], c.norm_eps)
        latents.append(torch.cat((latent, turned(key)), dim=1))
        if c.query_rank is None:
            query = self.apply(x, part, "q")
        else:
            query = self.apply(x, part, "q_a")
            query = self.rules.rms_norm(query, part["q_a_norm"], c.norm_eps)
            query = self.apply(query, part, "q_b")
        heads = query.reshape(c.heads, -1)  # [heads, plain_dim + rope_dim]
        kv_b = part["kv_b"].view(c.heads, -1, c.kv_rank)
        keys = kv_b[:, : c.plain_dim]  # [heads, plain_dim, kv_rank]
        values = kv_b[:, c.plain_dim :]  # [heads, value_dim, kv_rank]
        absorbed = [
            self.linear(heads[h : h + 1, : c.plain_dim], keys[h].t()) for h in range(c.heads)
        ]
        query = torch.cat((torch.cat(absorbed), turned(heads[:, c.plain_dim :])), dim=1)
        seen = _by_head(latents)  # [1, seen, kv_rank + rope_dim]: the same for every head
        scale = rope.score_factor / math.sqrt(c.head_dim)
        out = self.rules.attend(query[None], seen, seen[..., : c.kv_rank], scale)
        rows = [self.linear(out[:, h], values[h]) for h in range(c.heads)]  # of [1, kv_rank]
        return self.apply(torch.cat(rows, dim=1), part, "o")

    def _experts(
        self, layer: int, c: MoeFeed, residual: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows [1, hidden] → the layer's output [1, hidden] and the chosen experts [top_k]."""
        parts = self.model.parts
        router = parts[f"layer{layer}.router"]
        logits = self.linear(x, router["weight"], router.get("bias"))
        correction = router.get("correction")
        experts, weights = route(self.rules, logits, c.top_k, c.routing, correction)  # [1, top_k]
        rows = [
            self._feed_forward(c.activation, parts[f"layer{layer}.expert{expert}"], x)
            for expert in experts[0]
        ]
        out = self.rules.combine(
            residual, weights, torch.stack(rows, dim=1)
        )  # rows: [1, top_k, hidden]
        if c.shared_intermediate:
            shared = self._feed_forward(c.activation, parts[f"layer{layer}.shared"], x)
            out = self.rules.add(out, shared)
        return out, experts[0]

    def _feed_forward(self, activation: Activation, w: Weights, x: Tensor) -> Tensor:
        """One expert's unweighted result, or a dense network's: x [1, hidden] → [1, hidden]."""
        if isinstance(activation, ClampedGate):
            both = self.apply(x, w, "gate_up_interleaved")
            active = self.rules.clamped(both, activation.limit, activation.alpha)
        elif "gate" in w:
            active = self.rules.swiglu(self.apply(x, w, "gate"), self.apply(x, w, "up"))
        else:
            active = self.rules.swiglu(*self.apply(x, w, "gate_up").chunk(2, dim=1))
        return self.apply(active, w, "down")


def _floats(held: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Everything in float32; a matrix with scales becomes its codes, and the scales beside it.

    Codes of int8 stay what they are, and MXFP4 that is multiplied by whole rows.
    """
    floats = {}
    for role, weight in held.items():
        if isinstance(weight, Mxfp4) and weight.whole_rows:
            floats[role], floats[_scales(role)] = weight.blocks, weight.scales
        elif isinstance(weight, Scaled):
            whole = weight.codes.dtype == torch.int8
            floats[role] = weight.codes if whole else weight.codes.float()
            floats[_scales(role)] = weight.scales
        else:
            floats[role] = widened(weight)
    return floats


def _scales(role: str) -> str:
    return f"{role} scales"


def _by_head(rows: list[Tensor]) -> Tensor:
    """The rows [heads, dim] of some positions as [heads, positions, dim], aligned."""
    heads, dim = rows[0].shape
    flat = aligned(heads * len(rows), dim)
    flat.copy_(torch.stack(rows, dim=1).reshape(-1, dim))
    return flat.view(heads, len(rows), dim)
