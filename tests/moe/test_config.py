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
    GroupedAttention,
    ModelConfig,
    MoeFeed,
    Rope,
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
        ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
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
            config = parse_config(_break(rng, (MIXTRAL, GPT_OSS)[number % 2]))
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
