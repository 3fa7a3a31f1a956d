"""Mixtral (arXiv 2401.04088): softmax over all experts, the best k renormalised."""

from dataclasses import replace

from blyan_node.moe.config import LayerConfig, ModelConfig, MoeFeed, Routing, SiluGate
from blyan_node.moe.families.family import Family
from blyan_node.moe.layout import (
    Form,
    SubjectLayout,
    fused_expert,
    gated_fused,
    router_part,
    separate_expert,
)
from blyan_node.moe.reading import (
    read_attention,
    read_experts,
    read_hidden,
    read_intermediate,
    read_layers,
    read_model,
    read_window,
)
from blyan_node.moe.strict_json import Fields


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu", "silu")
    hidden = read_hidden(fields)
    attention = replace(read_attention(fields, hidden), window=read_window(fields, None))
    experts, top_k = read_experts(fields, "num_local_experts")
    routing = Routing("softmax", renormalise=True)
    feed = MoeFeed(experts, top_k, read_intermediate(fields), SiluGate(), routing)
    layers = (LayerConfig(attention, feed),) * read_layers(fields)
    return read_model(fields, "mixtral", hidden, layers, theta=1e6, norm_eps=1e-5)


def _prefix(form: Form) -> str:
    return "mlp." if form == "fused" else "block_sparse_moe."


def _feed(config: ModelConfig, layer: int, form: Form) -> list[SubjectLayout]:
    return [router_part(config, layer, _prefix(form))]


def _expert(config: ModelConfig, layer: int, expert: int, form: Form) -> SubjectLayout:
    feed = config.layers[layer].feed
    assert isinstance(feed, MoeFeed)
    if form == "fused":
        tensors = gated_fused(config.hidden, feed.intermediate)
        return fused_expert(layer, expert, _prefix(form), tensors)
    return separate_expert(config, layer, expert, _prefix(form), ("w1", "w3", "w2"))


FAMILY = Family("mixtral", _read, _feed, _expert, ("separate", "fused"))
