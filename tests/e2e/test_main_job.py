"""The main job on four real daemons: published, spread, answered, exact, exported."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Node, Testnet, blyan
from blyan_node.testing.directories import tensor_digests
from blyan_node.testing.reference import open_reference
from blyan_node.testing.truth import greedy, logits_of

PROMPT = [3, 17, 42, 5, 9, 23, 31, 8, 2, 11, 60, 44, 7, 19, 28, 1, 35, 50, 13, 6, 27, 39, 4, 21] * 2
NEW = 16


@dataclass(frozen=True)
class Published:
    name: str
    path: Path
    result: dict[str, Any]


@pytest.fixture(scope="module", params=("mixtral", "gpt_oss"))
def published(
    swarm: Testnet, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Published:
    """A hot tiny checkpoint of each family, published with two replicas of every expert."""
    path = make_checkpoint(request.param, tmp_path_factory.mktemp("models") / request.param)
    name = request.param.replace("_", "-")
    result = swarm["alice"]("model", "publish", path, "--name", name, "--wait-replicas", 2)
    return Published(name, path, result)


def _generate(node: Node, model: str, ids: list[int] = PROMPT, count: int = NEW) -> dict[str, Any]:
    return node(
        "generate", "--model", model, "--prompt-ids", ",".join(map(str, ids)),
        "--max-tokens", count, "--temperature", 0, "--ignore-eos",
    )  # fmt: skip


def test_the_main_node_holds_no_expert(swarm: Testnet, published: Published) -> None:
    assert swarm["alice"]("status")["held"] == {"experts": 0, "bytes": 0}
    experts = swarm["alice"]("expert", "list", "--model", published.name)["experts"]
    assert len(experts) == published.result["experts"]
    assert all(len(expert["holders"]) >= 2 for expert in experts)
    alice = swarm["alice"].peer_id
    assert not [e for e in experts if alice in {h["peer_id"] for h in e["holders"]}]


def test_greedy_tokens_equal_transformers_and_the_reference(
    swarm: Testnet, published: Published
) -> None:
    answer = _generate(swarm["alice"], published.name)
    assert answer["token_ids"] == greedy(published.path, PROMPT, NEW)
    assert answer["token_ids"] == open_reference(published.path).generate(PROMPT, NEW)
    assert answer["finish"] == "length"
    assert answer["root"] == published.result["root"]
    peers = {peer for expert in answer["trace"].values() for peer in expert["peers"]}
    assert peers and swarm["alice"].peer_id not in peers
    assert answer["stats"]["remote_calls"] > 0
    assert answer["stats"]["new_tokens"] == NEW


def test_forward_equals_transformers_and_the_reference_bit_for_bit(
    swarm: Testnet, published: Published, tmp_path: Path
) -> None:
    out = tmp_path / "forward.safetensors"
    swarm["alice"](
        "forward", "--model", published.name, "--prompt-ids", ",".join(map(str, PROMPT)),
        "--out", out,
    )  # fmt: skip
    tensors = load_file(out)
    truth = logits_of(published.path, PROMPT)
    assert (tensors["logits"] - truth).abs().max() <= 1e-3 * truth.abs().max()
    logits, experts = open_reference(published.path).forward(PROMPT)
    assert torch.equal(tensors["logits"], logits)
    for layer, chosen in experts.items():
        assert torch.equal(tensors[f"layer{layer}.experts"], chosen)


def test_other_requests_at_the_same_time_change_no_token(
    swarm: Testnet, published: Published
) -> None:
    prompts = [PROMPT[start : start + 5 + 3 * start] for start in range(8)]
    reference = open_reference(published.path)
    expected = [reference.generate(prompt, NEW) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as threads:
        answers = threads.map(
            lambda prompt: _generate(swarm["alice"], published.name, prompt), prompts
        )
        assert [answer["token_ids"] for answer in answers] == expected


def test_sampling_depends_on_the_seed_alone(swarm: Testnet, published: Published) -> None:
    def sample(seed: int) -> list[int]:
        answer: dict[str, Any] = swarm["alice"](
            "generate", "--model", published.name, "--prompt-ids", "1,2,3,4,5", "--max-tokens", 12,
            "--temperature", 1.0, "--top-p", 0.9, "--seed", seed, "--ignore-eos",
        )  # fmt: skip
        tokens: list[int] = answer["token_ids"]
        return tokens

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_publishing_again_changes_nothing(swarm: Testnet, published: Published) -> None:
    again = swarm["alice"]("model", "publish", published.path, "--name", published.name)
    assert again["root"] == published.result["root"]
    assert again["blocks"] == 0
    assert again["reused_bytes"] == again["bytes"]


def test_export_is_byte_equal_and_loads(
    swarm: Testnet, published: Published, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    swarm["alice"]("model", "export", published.name, out)
    assert tensor_digests(out) == tensor_digests(published.path)
    config = json.loads((published.path / "config.json").read_text())
    assert json.loads((out / "config.json").read_text()) == config
    assert torch.equal(logits_of(out, PROMPT), logits_of(published.path, PROMPT))


def test_every_stored_byte_verifies(swarm: Testnet, published: Published) -> None:
    verified = swarm["alice"]("model", "verify", published.name)
    assert verified["ok"] and not verified["bad"]
    assert swarm["alice"]("chain", "verify")["ok"]


def test_every_node_says_the_same(swarm: Testnet, published: Published) -> None:
    for node in swarm.nodes.values():
        (model,) = (m for m in node("model", "list")["models"] if m["name"] == published.name)
        assert model["root"] == published.result["root"]
        assert model["held"] == model["experts"] == published.result["experts"]


def test_an_unknown_model_is_an_error_that_names_it(swarm: Testnet) -> None:
    document = swarm["alice"](
        "generate", "--model", "nowhere", "--prompt-ids", "1", "--max-tokens", 1, code=1
    )
    assert "nowhere" in document["error"]["message"]


def test_a_node_that_is_not_there_is_exit_2(tmp_path: Path) -> None:
    document = blyan("--home", tmp_path / "none", "status", code=2)
    assert "no" in document["error"]["message"].lower()
