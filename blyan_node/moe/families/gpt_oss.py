"""gpt-oss (arXiv 2508.10925): attention sinks, every other layer windowed, softmax of the chosen.

The experts of a layer are fused, with gate and up interleaved: [in, out], or as MXFP4 [out, in].
"""

from dataclasses import replace

from blyan_node.moe.config import ClampedGate, LayerConfig, ModelConfig, MoeFeed, Routing
from blyan_node.moe.families.family import Family
from blyan_node.moe.layout import Form, Local, SubjectLayout, fused_expert, mxfp4, router_part
from blyan_node.moe.reading import (
    read_attention,
    read_experts,
    read_hidden,
    read_intermediate,
    read_layers,
    read_model,
    read_mxfp4,
    read_window,
)
from blyan_node.moe.strict_json import Fields, show


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu", "silu")
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        fields.refuse("rope_parameters", "is missing")
    hidden, count = read_hidden(fields), read_layers(fields)
    bias = fields.flag("attention_bias", True)
    attention = replace(read_attention(fields, hidden), bias=bias, sinks=True)
    experts, top_k = read_experts(fields, "num_local_experts")
    if fields.take("experts_per_token", top_k) != top_k:
        fields.refuse("experts_per_token", "differs from num_experts_per_tok")
    activation = ClampedGate(
        alpha=fields.number("swiglu_alpha", 0.0, 100.0, 1.702),
        limit=fields.number("swiglu_limit", 1e-3, 1e6, 7.0),
    )
    routing = Routing("softmax_chosen", renormalise=True, bias=True)
    inner = read_intermediate(fields)
    packed = read_mxfp4(fields, hidden, inner)
    feed = MoeFeed(experts, top_k, inner, activation, routing, bias=True, mxfp4=packed)
    layers = [
        LayerConfig(replace(attention, window=window), feed) for window in _windows(fields, count)
    ]
    config = read_model(fields, "gpt_oss", hidden, layers, theta=150_000.0, norm_eps=1e-5)
    original = config.rope.original_positions
    if fields.take("initial_context_length", original) != original:
        fields.refuse("initial_context_length", "differs from original_max_position_embeddings")
    return config


def _windows(fields: Fields, layers: int) -> list[int | None]:
    size = read_window(fields, 128)
    kinds = fields.take("layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        fields.refuse("layer_types", f"does not list {layers} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            fields.refuse("layer_types", f"has {show(kind)}")
    if size is None and "sliding_attention" in kinds:
        fields.refuse("sliding_window", "is missing, but layer_types asks for it")
    return [size if kind == "sliding_attention" else None for kind in kinds]


def _feed(config: ModelConfig, layer: int, form: Form) -> list[SubjectLayout]:
    return [router_part(config, layer, "mlp.", "router")]


def _expert(config: ModelConfig, layer: int, expert: int, form: Form) -> SubjectLayout:
    feed, hidden = config.layers[layer].feed, config.hidden
    assert isinstance(feed, MoeFeed)
    tensors = (
        *_matrix(feed, "gate_up_interleaved", "gate_up_proj", 2 * feed.intermediate, hidden),
        Local("gate_up_bias", "gate_up_proj_bias", (2 * feed.intermediate,)),
        *_matrix(feed, "down", "down_proj", hidden, feed.intermediate),
        Local("down_bias", "down_proj_bias", (hidden,)),
    )
    return fused_expert(layer, expert, "mlp.", tensors)


def _matrix(feed: MoeFeed, role: str, name: str, out: int, into: int) -> list[Local]:
    if feed.mxfp4:
        return mxfp4(role, name, out, into)
    return [Local(role, name, (into, out), transposed=True)]


FAMILY = Family("gpt_oss", _read, _feed, _expert, ("fused",))
