"""Qwen3-MoE (arXiv 2505.09388): each head's queries and keys normed; layers may be dense.

It is released as bfloat16, and as FP8 in blocks.
"""

from dataclasses import replace

from blyan_node.moe.config import DenseFeed, LayerConfig, ModelConfig, MoeFeed, Routing, SiluGate
from blyan_node.moe.families.family import Family
from blyan_node.moe.layout import mlp_expert, mlp_parts
from blyan_node.moe.reading import (
    read_attention,
    read_experts,
    read_fp8,
    read_hidden,
    read_intermediate,
    read_layers,
    read_model,
    read_window,
)
from blyan_node.moe.strict_json import Fields


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu", "silu")
    fields.only("use_qk_norm", True, True)  # this and the next two: of released configurations
    fields.only("qkv_bias", False, False)
    fields.only("shared_expert_intermediate_size", 0, 0)
    hidden = read_hidden(fields)
    attention = replace(
        read_attention(fields, hidden),
        window=_window(fields),
        bias=fields.flag("attention_bias", False),
        qk_norm="head",
    )
    experts, top_k = read_experts(fields, "num_experts", "num_local_experts")
    moe = MoeFeed(
        experts,
        top_k,
        read_intermediate(fields, "moe_intermediate_size"),
        SiluGate(),
        Routing("softmax", renormalise=fields.flag("norm_topk_prob", False)),
    )
    dense = DenseFeed(read_intermediate(fields), SiluGate())
    layers = [LayerConfig(attention, moe if sparse else dense) for sparse in _sparse(fields)]
    fp8 = read_fp8(fields)
    config = read_model(fields, "qwen3_moe", hidden, layers, theta=10_000.0, norm_eps=1e-6)
    return replace(config, fp8=fp8)


def _window(fields: Fields) -> int | None:
    """The window of every layer, if it is used at all.

    `max_window_layers` would leave the first layers without one; `transformers` ignores it, others
    do not: with a window it must not leave any.
    """
    used, window = fields.flag("use_sliding_window", False), read_window(fields, 4096)
    full = fields.take("max_window_layers", None)
    if not used or window is None:
        return None
    if full not in (None, 0):
        fields.refuse("max_window_layers", "is not 0, but use_sliding_window is true")
    return window


def _sparse(fields: Fields) -> list[bool]:
    """By layer: whether it has experts."""
    count, step = read_layers(fields), fields.integer("decoder_sparse_step", 1, 1 << 20, 1)
    dense = fields.take("mlp_only_layers", None)
    dense = [] if dense is None else dense
    if not isinstance(dense, list) or not all(type(n) is int and 0 <= n < count for n in dense):
        fields.refuse("mlp_only_layers", f"is no list of layers below {count}")
    return [n not in dense and (n + 1) % step == 0 for n in range(count)]


FAMILY = Family("qwen3_moe", _read, mlp_parts, mlp_expert, ("separate", "fused"))
