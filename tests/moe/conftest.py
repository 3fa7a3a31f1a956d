"""Checkpoints that the engine's tests share; made once."""

from pathlib import Path

import pytest
import torch

from blyan_node.testing.checkpoints import make_checkpoint

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


@pytest.fixture(params=sorted(VARIANTS))
def directory(request: pytest.FixtureRequest, directories: dict[str, Path]) -> Path:
    return directories[request.param]
