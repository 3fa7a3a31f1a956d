"""config.json: what is understood, what is refused by name, and 10,000 broken ones."""

import json
import math
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from blyan_node.moe.config import (
    ClampedGate,
    DenseFeed,
    GroupedAttention,
    LayerConfig,
    ModelConfig,
    MoeFeed,
    Rope,
    Routing,
    SiluGate,
)
from blyan_node.moe.families import parse_config
from protocols import limits
from protocols.errors import ErrorCode, Refused

MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "vocab_size": 32000,
    "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "eos_token_id": 2, "use_cache": True,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {  # gpt-oss-20b as released, without its quantisation
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "initial_context_length": 4096, "initializer_range": 0.02,
    "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False,
    "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 199999,
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn",
        "original_max_position_embeddings": 4096, "truncate": False,
    },
    "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 201088,
}  # fmt: skip
QWEN3_MOE: dict[str, Any] = {  # Qwen3-30B-A3B as released, with 2 of 48 layers
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "mlp_only_layers": [],
    "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 2, "num_key_value_heads": 4, "output_router_logits": False,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
OLMOE: dict[str, Any] = {  # OLMoE-1B-7B-0924 as released, with 2 of 16 layers
    "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "clip_qkv": None, "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 1024, "max_position_embeddings": 4096,
    "model_type": "olmoe", "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
    "num_experts_per_tok": 8, "num_hidden_layers": 2, "num_key_value_heads": 16,
    "output_router_logits": False, "pad_token_id": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0",
    "use_cache": True, "vocab_size": 50304,
}  # fmt: skip
ALL = (MIXTRAL, GPT_OSS, QWEN3_MOE, OLMOE)
OLD_ROPE = {"rope_theta": None}


def _parse(fields: dict[str, Any]) -> ModelConfig:
    return parse_config(json.dumps(fields).encode())


def test_the_older_form_of_mixtral() -> None:
    config = _parse(MIXTRAL)
    assert [layer.attention for layer in config.layers] == [GroupedAttention(32, 8, 128)] * 2
    assert config.rope == Rope(1e6)
    assert config.eos == (2,)


def test_gpt_oss_as_released() -> None:
    config = _parse(GPT_OSS)
    assert [layer.attention.window for layer in config.layers] == [128, None]
    assert config.rope.theta == 150_000 and not config.rope.truncate
    assert math.isclose(config.rope.attention_factor, 1.3465735902799727)
    feed = config.layers[0].feed
    assert isinstance(feed, MoeFeed) and feed.activation == ClampedGate(1.702, 7.0)


def test_qwen3_moe_as_released() -> None:
    config = _parse(QWEN3_MOE)
    attention = GroupedAttention(32, 4, 128, qk_norm="head")
    feed = MoeFeed(128, 8, 768, SiluGate(), Routing("softmax", renormalise=True))
    assert config.layers == (LayerConfig(attention, feed),) * 2
    assert config.rope == Rope(1e6) and config.norm_eps == 1e-6


def test_what_later_releases_of_qwen3_moe_say_besides() -> None:
    more = {"use_qk_norm": True, "qkv_bias": False, "shared_expert_intermediate_size": 0}
    assert _parse({**QWEN3_MOE, **more}) == _parse(QWEN3_MOE)


def test_olmoe_as_released() -> None:
    config = _parse(OLMOE)
    attention = GroupedAttention(16, 16, 128, qk_norm="whole")
    feed = MoeFeed(64, 8, 1024, SiluGate(), Routing("softmax", renormalise=False))
    assert config.layers == (LayerConfig(attention, feed),) * 2
    assert config.eos == (50279,)


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({}, []),
        ({"decoder_sparse_step": 2}, [0, 2, 4]),
        ({"mlp_only_layers": [0, 3]}, [0, 3]),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 3}, [0, 1, 3, 4]),
    ],
)
def test_dense_layers_of_qwen3_moe(change: dict[str, Any], dense: list[int]) -> None:
    config = _parse({**QWEN3_MOE, "num_hidden_layers": 6, **change})
    feeds = [layer.feed for layer in config.layers]
    assert [n for n, feed in enumerate(feeds) if feed == DenseFeed(6144, SiluGate())] == dense
    assert [n for n in range(6) if config.experts_of(n) == 0] == dense


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"sliding_window": 64}, None),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        ({"sliding_window": None, "use_sliding_window": True, "max_window_layers": 9}, None),
    ],
)
def test_windows_of_qwen3_moe(change: dict[str, Any], window: int | None) -> None:
    config = _parse({**QWEN3_MOE, **change})
    assert [layer.attention.window for layer in config.layers] == [window] * 2


def test_both_forms_of_rope_say_the_same() -> None:
    named = {**GPT_OSS, **OLD_ROPE, "rope_scaling": None}
    named["rope_parameters"] = {**GPT_OSS["rope_scaling"], "rope_theta": 150000}
    assert _parse(named) == _parse(GPT_OSS)


def test_what_transformers_writes_is_read(directories: dict[str, Path]) -> None:
    for directory in directories.values():
        data = (directory / "config.json").read_bytes()
        config = parse_config(data)
        assert len(config.layers) == json.loads(data)["num_hidden_layers"]
        assert config.vocab == 97 and config.eos == (1,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": ["mixtral"]}, "model_type"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {}}, "rope_scaling"),
        ({"rope_scaling": "yarn"}, "rope_scaling is not an object"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"attention_bias": True}, "attention_bias"),
        ({"logit_softcap": 30.0}, "'logit_softcap' is unknown"),
        ({"auto_map": {"AutoModel": "code.py"}}, "auto_map"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"num_local_experts": 10**6}, "num_local_experts"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "does not divide"),
        ({"num_attention_heads": 31, "num_key_value_heads": 31}, "head_dim is missing"),
        ({"head_dim": 63}, "head_dim is 63"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named) as refusal:
        _parse({**MIXTRAL, **change})
    assert refusal.value.code is ErrorCode.BAD_MODEL


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention", "chunked_attention"]}, "chunked_attention"),
        ({"layer_types": [["full_attention"], {}]}, "layer_types"),
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"rope_scaling": None}, "rope_parameters is missing"),
        ({"experts_per_token": 2}, "experts_per_token"),
        ({"initial_context_length": 8192}, "initial_context_length"),
        ({"swiglu_limit": "7"}, "swiglu_limit"),
    ],
)
def test_gpt_oss_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        _parse({**GPT_OSS, **change})


@pytest.mark.parametrize(
    ("fields", "change", "named"),
    [
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 8}, "max_window_layers is not"),
        (QWEN3_MOE, {"mlp_only_layers": [2]}, "mlp_only_layers"),
        (QWEN3_MOE, {"mlp_only_layers": 1}, "mlp_only_layers"),
        (QWEN3_MOE, {"mlp_only_layers": [0, 1]}, "no layer has experts"),
        (QWEN3_MOE, {"decoder_sparse_step": 3}, "no layer has experts"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step"),
        (QWEN3_MOE, {"num_local_experts": 64}, "num_local_experts differs"),
        (QWEN3_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        (QWEN3_MOE, {"norm_topk_prob": "yes"}, "norm_topk_prob"),
        (QWEN3_MOE, {"clip_qkv": 8.0}, "clip_qkv"),
        (QWEN3_MOE, {"shared_expert_intermediate_size": 512}, "shared_expert"),
        (QWEN3_MOE, {"use_qk_norm": False}, "use_qk_norm"),
        (QWEN3_MOE, {"qkv_bias": True}, "qkv_bias"),
        (OLMOE, {"clip_qkv": -1.0}, "clip_qkv"),
        (OLMOE, {"head_dim": 64}, "head_dim times 16 heads is not 2048"),
        (OLMOE, {"sliding_window": 128}, "sliding_window"),
        (OLMOE, {"num_experts": None}, "num_experts is missing"),
    ],
)
def test_others_refused_by_name(fields: dict[str, Any], change: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused, match=named):
        _parse({**fields, **change})


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe", b"[" * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}", b" " * (limits.config_bytes_max + 1),
    ],
)  # fmt: skip
def test_what_is_no_configuration(data: bytes) -> None:
    with pytest.raises(Refused, match=r"config\.json"):
        parse_config(data)


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e308, 10**30, "", "yarn", "silu", "\ud800", [],
    [1], ["full_attention"] * 2, {}, {"rope_type": "yarn"}, {"rope_type": []}, {"a": {"b": []}},
]  # fmt: skip


def _break(rng: random.Random, fields: dict[str, Any]) -> bytes:
    broken = json.loads(json.dumps(fields))
    for _ in range(rng.randint(1, 4)):
        where = broken
        scaling = broken.get("rope_scaling")
        if isinstance(scaling, dict) and scaling and rng.random() < 0.3:
            where = scaling
        name = rng.choice([*where, "rope_parameters", "x" * rng.randint(1, 9)])
        if rng.random() < 0.2:
            where.pop(name, None)
        else:
            where[name] = deepcopy(rng.choice(VALUES))
    data = bytearray(json.dumps(broken).encode())
    if rng.random() < 0.3:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def test_ten_thousand_broken_configurations() -> None:
    rng, read = random.Random(12), 0
    for number in range(10_000):
        try:
            config = parse_config(_break(rng, ALL[number % len(ALL)]))
        except Refused as refusal:
            assert refusal.code is ErrorCode.BAD_MODEL
            str(refusal).encode()
        else:
            read += 1
            assert math.isfinite(config.rope.theta)
            for layer in config.layers:
                assert layer.attention.heads % layer.attention.kv_heads == 0
                assert not isinstance(layer.feed, MoeFeed) or layer.feed.top_k <= layer.feed.experts
    assert 200 < read < 9_000
