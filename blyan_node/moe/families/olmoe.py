"""OLMoE (arXiv 2409.02060): queries and keys normed over all heads; no renormalising."""

from dataclasses import replace

from blyan_node.moe.config import LayerConfig, ModelConfig, MoeFeed, Routing, SiluGate
from blyan_node.moe.families.family import Family
from blyan_node.moe.layout import mlp_expert, mlp_parts
from blyan_node.moe.reading import (
    read_attention,
    read_experts,
    read_hidden,
    read_intermediate,
    read_layers,
    read_model,
)
from blyan_node.moe.strict_json import Fields


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu", "silu")
    hidden = read_hidden(fields)
    attention = replace(
        read_attention(fields, hidden),
        bias=fields.flag("attention_bias", False),
        qk_norm="whole",
        clip=_clip(fields),
    )
    if attention.heads * attention.head_dim != hidden:
        fields.refuse("head_dim", f"times {attention.heads} heads is not {hidden}")
    experts, top_k = read_experts(fields, "num_experts", "num_local_experts")
    routing = Routing("softmax", renormalise=fields.flag("norm_topk_prob", False))
    feed = MoeFeed(experts, top_k, read_intermediate(fields), SiluGate(), routing)
    layers = (LayerConfig(attention, feed),) * read_layers(fields)
    return read_model(fields, "olmoe", hidden, layers, theta=10_000.0, norm_eps=1e-5)


def _clip(fields: Fields) -> float | None:
    return fields.number("clip_qkv", 1e-6, 1e6) if fields.has("clip_qkv") else None


FAMILY = Family("olmoe", _read, mlp_parts, mlp_expert, ("separate", "fused"))
