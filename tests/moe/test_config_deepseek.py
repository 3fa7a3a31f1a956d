"""config.json of DeepSeek-V3's family: as released, what is refused by name, and broken ones."""

import json
import random
from typing import Any

import pytest

from blyan_node.moe.config import (
    DenseFeed,
    LatentAttention,
    ModelConfig,
    MoeFeed,
    Rope,
    Routing,
    SiluGate,
)
from blyan_node.moe.families import layout, parse_config, sources
from protocols.errors import ErrorCode, Refused

RELEASED: dict[str, Any] = {  # DeepSeek-V3, with 5 of 61 layers
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 5,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
WIDENED = {**RELEASED, "quantization_config": None}
MOONLIGHT = {  # another model of the family: no latent of the queries, no groups, no YaRN
    **WIDENED, "aux_loss_alpha": 0.001, "seq_aux": True, "pretraining_tp": 1, "q_lora_rank": None,
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11264, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16,
    "num_experts_per_tok": 6, "num_key_value_heads": 16, "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0, "topk_group": 1,
    "routed_scaling_factor": 2.446, "moe_intermediate_size": 1408, "max_position_embeddings": 8192,
}  # fmt: skip


def _parse(fields: dict[str, Any]) -> ModelConfig:
    return parse_config(json.dumps(fields).encode())


def test_as_released_but_for_its_precision() -> None:
    config = _parse(WIDENED)
    assert not config.fp8
    routing = Routing(
        "sigmoid", renormalise=True, correction=True, groups=8, groups_chosen=4, scaling=2.5
    )
    dense = DenseFeed(18432, SiluGate())
    moe = MoeFeed(256, 8, 2048, SiluGate(), routing, shared_intermediate=2048)
    assert [layer.feed for layer in config.layers] == [dense] * 3 + [moe] * 2
    attention = LatentAttention(128, 1536, 512, 128, 64, 128)
    assert {layer.attention for layer in config.layers} == {attention}
    assert (config.rope.factor, config.rope.attention_factor) == (40.0, 1.0)
    assert config.rope.score_factor == pytest.approx(1.3688879454113936**2)
    assert config.context == config.positions_max == 163840
    assert _parse(WIDENED | {"max_position_embeddings": 4096}).context == 163840


def test_another_model_of_the_family() -> None:
    config = _parse(MOONLIGHT)
    assert config.layers[0].attention == LatentAttention(16, None, 512, 128, 64, 128)
    feed = config.layers[1].feed
    assert isinstance(feed, MoeFeed) and feed.shared_intermediate == 2816
    assert (feed.routing.groups, feed.routing.scaling) == (1, 2.446)
    assert config.rope == Rope(50_000.0)


def test_parts() -> None:
    parts = {str(part.subject): part for part in layout(_parse(WIDENED))}
    names = {tensor.source: tensor.shape for part in parts.values() for tensor in part.tensors}
    assert names["model.layers.0.self_attn.kv_b_proj.weight"] == (128 * 256, 512)
    assert names["model.layers.4.mlp.experts.255.down_proj.weight"] == (7168, 2048)
    assert names["model.layers.3.mlp.gate.e_score_correction_bias"] == (256,)
    assert names["model.layers.3.mlp.shared_experts.up_proj.weight"] == (2048, 7168)
    assert names["model.layers.2.mlp.gate_proj.weight"] == (18432, 7168)
    assert {"layer2.mlp", "layer3.shared", "layer3.router", "layer4.expert255"} <= parts.keys()
    assert not {"layer2.router", "layer2.shared", "layer3.mlp"} & parts.keys()


def test_the_tensors_as_released() -> None:
    config = _parse(RELEASED)
    assert config.fp8 and config.mtp_layers == 1
    expected, here = sources(config), "model.layers.4."
    assert expected[here + "self_attn.kv_b_proj.weight"] == (32768, 512)
    assert expected[here + "self_attn.kv_b_proj.weight_scale_inv"] == (256, 4)
    assert expected[here + "self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert expected[here + "mlp.experts.255.down_proj.weight_scale_inv"] == (56, 16)
    assert expected["model.layers.0.mlp.gate_proj.weight_scale_inv"] == (144, 56)
    for plain in ("lm_head.weight", "model.embed_tokens.weight", here + "mlp.gate.weight"):
        assert plain in expected and f"{plain}_scale_inv" not in expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "awq"}, "asks for 'awq', which is not read in this family"),
        ({"quant_method": None}, "asks for missing"),
        ({"weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\]"),
        ({"weight_block_size": None}, "weight_block_size is missing"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"modules_to_not_convert": ["model.layers.3.mlp.experts"]}, "experts', which is to be"),
        ({"modules_to_not_convert": ["model.layers.3.mlp.gate_proj"]}, "gate_proj', which is to"),
        ({"bits": 4}, "'bits' is unknown"),
    ],
)
def test_another_quantisation_is_refused_by_name(change: dict[str, object], named: str) -> None:
    quantised = RELEASED["quantization_config"] | change
    with pytest.raises(Refused, match=named):
        _parse(RELEASED | {"quantization_config": quantised})


def test_modules_that_are_no_fp8_may_be_listed() -> None:
    kept = ["lm_head", "model.layers.0.mlp.gate", "model.layers.0.input_layernorm",
            "model.layers.0.post_attention_layernorm"]  # fmt: skip
    quantised = RELEASED["quantization_config"] | {"modules_to_not_convert": kept}
    assert _parse(RELEASED | {"quantization_config": quantised}).fp8


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"topk_method": "group_limited_greedy"}, "topk_method"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"auto_map": {"AutoModel": "code.py"}}, "auto_map"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ({"kv_lora_rank": None}, "kv_lora_rank is missing"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        ({"head_dim": 128}, "head_dim is 128"),
        ({"qk_head_dim": 128}, "qk_head_dim is 128"),
        ({"n_group": 7}, "n_group is 7"),
        ({"n_group": 256}, "n_group is 256"),
        ({"topk_group": 9}, "topk_group is 9"),
        ({"topk_group": 1, "num_experts_per_tok": 33}, "topk_group is 1"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0"),
        ({"first_k_dense_replace": 6}, "first_k_dense_replace is 6"),
        ({"first_k_dense_replace": 5}, "no layer has experts"),
        ({"rope_scaling": {**RELEASED["rope_scaling"], "mscale": "1"}}, "mscale is '1'"),
        ({"rope_interleave": 1}, "rope_interleave is 1"),
        ({"index_topk": 2048}, "'index_topk' is unknown"),
    ],
)
def test_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named) as refusal:
        _parse({**WIDENED, **change})
    assert refusal.value.code is ErrorCode.BAD_MODEL


VALUES: list[Any] = [
    None, True, 0, 1, -1, 2, 3, 8, 64, 1.5, 1e308, 10**30, "", "yarn", [], [1], {}, {"a": [None]},
]  # fmt: skip


def test_broken_ones_are_refused_or_whole() -> None:
    rng, read = random.Random(7), 0
    for number in range(4000):
        fields = dict((WIDENED, MOONLIGHT)[number % 2])
        for _ in range(rng.randint(1, 4)):
            fields[rng.choice([*RELEASED, "rope_parameters", "head_dim"])] = rng.choice(VALUES)
        try:
            config = _parse(fields)
        except Refused as refusal:
            assert refusal.code is ErrorCode.BAD_MODEL
        else:
            read += 1
            for layer in config.layers:
                if isinstance(feed := layer.feed, MoeFeed):
                    routing = feed.routing
                    in_reach = feed.experts // routing.groups * routing.groups_chosen
                    assert feed.top_k <= in_reach and feed.experts % routing.groups == 0
    assert 100 < read < 3500
