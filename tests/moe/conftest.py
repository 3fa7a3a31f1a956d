"""Checkpoints that the engine's tests share; made once."""

from pathlib import Path

import pytest
import torch

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.truth import logits_of

VARIANTS = {
    "mixtral": ("mixtral", {}),
    "mixtral-odd": (
        "mixtral",
        {
            "seed": 5, "dtype": "bfloat16", "sharded": True, "tie_word_embeddings": True,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 6, "hidden_size": 37,
            "intermediate_size": 29, "sliding_window": None, "num_experts_per_tok": 3,
        },
    ),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss-odd": (
        "gpt_oss",
        {
            "seed": 6, "dtype": "bfloat16", "sharded": True, "num_attention_heads": 7,
            "num_key_value_heads": 7, "head_dim": 10, "hidden_size": 33, "intermediate_size": 47,
            "num_local_experts": 5, "num_experts_per_tok": 4, "sliding_window": 7,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 0.6,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "deepseek_v3-odd": (
        "deepseek_v3",
        {
            "seed": 10, "dtype": "bfloat16", "sharded": True, "fused": True, "hidden_size": 37,
            "num_attention_heads": 5, "num_key_value_heads": 5, "q_lora_rank": None,
            "kv_lora_rank": 19, "qk_nope_head_dim": 7, "qk_rope_head_dim": 6, "v_head_dim": 9,
            "intermediate_size": 29, "moe_intermediate_size": 13, "n_shared_experts": 2,
            "n_routed_experts": 9, "n_group": 3, "num_experts_per_tok": 4, "rope_interleave": False,
            "first_k_dense_replace": 2, "num_hidden_layers": 4, "norm_topk_prob": False,
            "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.5,
        },
    ),
    "mixtral-fused": ("mixtral", {"seed": 7, "fused": True, "head_dim": 14}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "norm_topk_prob": True, "use_sliding_window": True, "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe-odd": (
        "qwen3_moe",
        {
            "seed": 8, "dtype": "bfloat16", "sharded": True, "fused": True, "num_experts": 5,
            "num_experts_per_tok": 3, "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 6, "hidden_size": 37, "intermediate_size": 29, "moe_intermediate_size": 19,
            "attention_bias": True, "num_hidden_layers": 4, "decoder_sparse_step": 2,
            "sliding_window": None, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmoe": (
        "olmoe",
        {
            "hidden_size": 42, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 14,
            "clip_qkv": 2.0,
        },
    ),
    "olmoe-odd": (
        "olmoe",
        {
            "seed": 9, "dtype": "bfloat16", "sharded": True, "fused": True, "num_experts": 7,
            "num_experts_per_tok": 3, "hidden_size": 54, "num_attention_heads": 9,
            "num_key_value_heads": 3, "head_dim": 6, "intermediate_size": 31,
            "norm_topk_prob": True, "attention_bias": True,
        },
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """The engine on one thread unless a test says otherwise."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every variant's directory by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: make_checkpoint(family, root / name, **options)
        for name, (family, options) in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def prompt() -> list[int]:
    """48 tokens: four times the window of most variants."""
    return [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(48)]


@pytest.fixture(scope="session")
def truths(directories: dict[str, Path], prompt: list[int]) -> dict[Path, torch.Tensor]:
    """What `transformers` says of each directory: logits [tokens, vocab] of the prompt."""
    return {path: logits_of(path, prompt) for path in directories.values()}


@pytest.fixture(params=sorted(VARIANTS))
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]
