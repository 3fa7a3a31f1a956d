"""Every family over four real daemons, no expert on the main node: exact, and exported whole.

`test_main_job` tells the whole story with two of them; here each is published as it lies on disk,
in the forms that people find (fused or one by one, in shards, bfloat16), and answers once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blyan_node.testing import fp8, mxfp4
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Testnet
from blyan_node.testing.directories import tensor_digests
from blyan_node.testing.fp8 import make_fp8_checkpoint
from blyan_node.testing.mxfp4 import make_mxfp4_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.truth import greedy, logits_of

PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(40)]  # over three windows long
NEW = 8
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v3": (
        "deepseek_v3",
        {
            "sharded": True, "hidden_size": 37, "n_shared_experts": 2,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 0.6,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "deepseek-v3-fused": (
        "deepseek_v3",
        {
            "fused": True, "dtype": "bfloat16", "first_k_dense_replace": 2, "q_lora_rank": None,
            "norm_topk_prob": False, "rope_interleave": False, "kv_lora_rank": 19,
        },
    ),
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


@dataclass(frozen=True)
class Model:
    """What is published under `name`, and the directory that `transformers` computes with.

    `widen` makes such a directory of one that it does not compute with on a CPU.
    """

    name: str
    path: Path
    plain: Path
    widen: Callable[[Path, Path], Path] | None = None


@pytest.fixture(params=[*sorted(PUBLISHED), "deepseek-v3-fp8", "gpt-oss-mxfp4"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    """A hot tiny checkpoint."""
    path, plain = tmp_path / "source", tmp_path / "widened"
    if request.param in PUBLISHED:
        family, options = PUBLISHED[request.param]
        make_checkpoint(family, path, **options)
        return Model(request.param, path, path)
    if request.param == "gpt-oss-mxfp4":
        make_mxfp4_checkpoint(path, sharded=True)
        return Model(request.param, path, mxfp4.dequantised(path, plain), mxfp4.dequantised)
    make_fp8_checkpoint(
        "deepseek_v3", path, mtp=True, sharded=True, num_hidden_layers=2, n_routed_experts=8
    )
    return Model(request.param, path, fp8.dequantised(path, plain), fp8.dequantised)


def test_published_spread_exact_and_exported(swarm: Testnet, model: Model, tmp_path: Path) -> None:
    name, path = model.name, model.path
    alice, ids = swarm["alice"], ",".join(map(str, PROMPT))
    rehearsed = alice("model", "publish", path, "--name", name, "--dry-run")
    published = alice("model", "publish", path, "--name", name, "--wait-replicas", 1)
    reference, truth = open_reference(path), logits_of(model.plain, PROMPT)

    answer = alice(
        "generate", "--model", name, "--prompt-ids", ids, "--max-tokens", NEW,
        "--temperature", 0, "--ignore-eos",
    )  # fmt: skip
    assert answer["root"] == published["root"]
    assert (
        answer["token_ids"] == greedy(model.plain, PROMPT, NEW) == reference.generate(PROMPT, NEW)
    )
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

    shown = alice("model", "show", name)["subjects"]
    assert published["experts"] == sum(".expert" in subject for subject in shown)
    kept = [subject for subject, about in shown.items() if not about["computed"]]
    assert kept == (["layer2.mtp"] if name == "deepseek-v3-fp8" else [])
    assert rehearsed["kept_bytes"] == sum(shown[subject]["bytes"] for subject in kept)

    alice("model", "export", name, tmp_path / "out")
    assert tensor_digests(tmp_path / "out") == tensor_digests(path)
    exported = tmp_path / "out"
    if model.widen is not None:
        exported = model.widen(exported, tmp_path / "exported")
    assert torch.equal(logits_of(exported, PROMPT), truth)
