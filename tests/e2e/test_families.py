"""Every family over four real daemons, no expert on the main node: exact, and exported whole.

`test_main_job` tells the whole story with two of them; here each is published as it lies on disk,
in the forms that people find (fused or one by one, in shards, bfloat16), and answers once.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Testnet
from blyan_node.testing.directories import tensor_digests
from blyan_node.testing.reference import open_reference
from blyan_node.testing.truth import greedy, logits_of

PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(40)]  # over three windows long
NEW = 8
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-fused": ("mixtral", {"fused": True, "dtype": "bfloat16"}),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "sharded": True, "norm_topk_prob": True, "use_sliding_window": True,
            "mlp_only_layers": [0], "num_attention_heads": 9, "num_key_value_heads": 3,
            "head_dim": 6, "hidden_size": 37,
        },
    ),
    "qwen3-moe-fused": (
        "qwen3_moe",
        {
            "fused": True, "dtype": "bfloat16", "mlp_only_layers": [1, 2],
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "olmoe": ("olmoe", {"sharded": True, "dtype": "bfloat16", "clip_qkv": 2.0}),
}  # fmt: skip


@pytest.fixture(params=sorted(PUBLISHED))
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A name and the hot tiny checkpoint that is published under it."""
    family, options = PUBLISHED[request.param]
    return request.param, make_checkpoint(family, tmp_path / "source", **options)


def test_published_spread_exact_and_exported(
    swarm: Testnet, directory: tuple[str, Path], tmp_path: Path
) -> None:
    name, path = directory
    alice, ids = swarm["alice"], ",".join(map(str, PROMPT))
    published = alice("model", "publish", path, "--name", name, "--wait-replicas", 1)
    reference, truth = open_reference(path), logits_of(path, PROMPT)

    answer = alice(
        "generate", "--model", name, "--prompt-ids", ids, "--max-tokens", NEW,
        "--temperature", 0, "--ignore-eos",
    )  # fmt: skip
    assert answer["root"] == published["root"]
    assert answer["token_ids"] == greedy(path, PROMPT, NEW) == reference.generate(PROMPT, NEW)
    peers = {peer for expert in answer["trace"].values() for peer in expert["peers"]}
    assert peers and alice.peer_id not in peers
    assert alice("status")["held"] == {"experts": 0, "bytes": 0}

    alice("forward", "--model", name, "--prompt-ids", ids, "--out", tmp_path / "pass.safetensors")
    tensors = load_file(tmp_path / "pass.safetensors")
    logits, experts = reference.forward(PROMPT)
    assert (tensors.pop("logits") - truth).abs().max() <= 1e-3 * truth.abs().max()
    assert torch.equal(load_file(tmp_path / "pass.safetensors")["logits"], logits)
    assert set(tensors) == {f"layer{layer}.experts" for layer in experts}
    for layer, chosen in experts.items():
        assert torch.equal(tensors[f"layer{layer}.experts"], chosen)

    alice("model", "export", name, tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(path)
    assert torch.equal(logits_of(tmp_path / "out", PROMPT), truth)
