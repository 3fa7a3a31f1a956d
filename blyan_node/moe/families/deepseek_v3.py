"""DeepSeek-V3 (arXiv 2412.19437): latent attention, groups of experts, shared experts.

As released its matrices are FP8 in blocks. Layers for predicting several tokens at once
(`num_nextn_predict_layers`) are kept and not computed (`blyan_node.moe.mtp`).
"""

from dataclasses import replace

from blyan_node.moe.config import (
    DenseFeed,
    LatentAttention,
    LayerConfig,
    ModelConfig,
    MoeFeed,
    Routing,
    SiluGate,
)
from blyan_node.moe.families.family import Family
from blyan_node.moe.layout import mlp_expert, mlp_parts
from blyan_node.moe.reading import (
    read_experts,
    read_fp8,
    read_hidden,
    read_intermediate,
    read_layers,
    read_model,
)
from blyan_node.moe.strict_json import Fields

_CODE = {  # what the released files name; their code is never run
    "AutoConfig": "configuration_deepseek.DeepseekV3Config",
    "AutoModel": "modeling_deepseek.DeepseekV3Model",
    "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
}
_TRAINING = ("aux_loss_alpha", "ep_size", "pretraining_tp", "seq_aux")
_MTP_LAYERS_MAX = 16


def _read(fields: Fields) -> ModelConfig:
    fields.only("hidden_act", "silu", "silu")
    _only(fields, "auto_map", _CODE)
    for name in _TRAINING:
        fields.take(name, None)
    hidden, count = read_hidden(fields), read_layers(fields)
    attention, moe = _attention(fields), _experts(fields)
    dense = DenseFeed(read_intermediate(fields), SiluGate())
    first = fields.integer("first_k_dense_replace", 0, count, min(3, count))
    layers = [LayerConfig(attention, dense if n < first else moe) for n in range(count)]
    behind = fields.integer("num_nextn_predict_layers", 0, _MTP_LAYERS_MAX, 0)
    fp8 = read_fp8(fields)
    config = read_model(
        fields, "deepseek_v3", hidden, layers, theta=10_000.0, norm_eps=1e-6, mscale=True
    )
    return replace(config, fp8=fp8, mtp_layers=behind)


def _attention(fields: Fields) -> LatentAttention:
    heads = fields.integer("num_attention_heads", 1, 4096)
    _only(fields, "num_key_value_heads", heads)
    rank = fields.has("q_lora_rank")
    rope = fields.integer("qk_rope_head_dim", 2, 4096)
    if rope % 2:
        fields.refuse("qk_rope_head_dim", f"is {rope}, expected an even number")
    attention = LatentAttention(
        heads=heads,
        query_rank=fields.integer("q_lora_rank", 1, 1 << 20) if rank else None,
        kv_rank=fields.integer("kv_lora_rank", 1, 1 << 20),
        plain_dim=fields.integer("qk_nope_head_dim", 1, 4096),
        rope_dim=rope,
        value_dim=fields.integer("v_head_dim", 1, 4096),
        interleaved=fields.flag("rope_interleave", True),
        bias=fields.flag("attention_bias", False),
    )
    _only(fields, "head_dim", rope)
    _only(fields, "qk_head_dim", attention.head_dim)
    return attention


def _only(fields: Fields, name: str, allowed: object) -> None:
    if fields.has(name):
        fields.only(name, allowed, None)


def _experts(fields: Fields) -> MoeFeed:
    fields.only("moe_layer_freq", 1, 1)
    experts, top_k = read_experts(fields, "n_routed_experts", "num_local_experts")
    inner = read_intermediate(fields, "moe_intermediate_size")
    shared = fields.integer("n_shared_experts", 1, 1024, 1)
    return MoeFeed(experts, top_k, inner, SiluGate(), _routing(fields, experts, top_k),
                   shared_intermediate=shared * inner)  # fmt: skip


def _routing(fields: Fields, experts: int, top_k: int) -> Routing:
    fields.only("scoring_func", "sigmoid", "sigmoid")
    fields.only("topk_method", "noaux_tc", "noaux_tc")
    groups = fields.integer("n_group", 1, experts, 8)
    if experts % groups or experts // groups < 2:
        fields.refuse("n_group", f"is {groups}, which does not cut {experts} experts into groups"
                      " of 2 or more")  # fmt: skip
    chosen = fields.integer("topk_group", 1, groups, min(4, groups))
    if chosen * (experts // groups) < top_k:
        fields.refuse("topk_group", f"is {chosen}, and {chosen} groups have fewer than {top_k}"
                      " experts")  # fmt: skip
    return Routing(
        "sigmoid",
        renormalise=fields.flag("norm_topk_prob", True),
        correction=True,
        groups=groups,
        groups_chosen=chosen,
        scaling=fields.number("routed_scaling_factor", 0.0, 1e6, 2.5),
    )


FAMILY = Family("deepseek_v3", _read, mlp_parts, mlp_expert, ("separate", "fused"))
