"""What happens to a request when machines die, blocks vanish and heads move."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Node, Testnet, blyan
from blyan_node.testing.reference import open_reference

PROMPT = [3, 17, 42, 5, 9, 23, 31, 8]
GENERATE: dict[str, Any] = {
    "model": "tiny", "prompt_ids": PROMPT, "temperature": 0, "ignore_eos": True,
}  # fmt: skip

MakeTestnet = Callable[..., Testnet]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A hot tiny mixtral."""
    return make_checkpoint("mixtral", tmp_path / "tiny")


def _publish(net: Testnet, path: Path, *options: object) -> dict[str, Any]:
    result: dict[str, Any] = net["alice"]("model", "publish", path, "--name", "tiny", *options)
    return result


def _generate_and(node: Node, count: int, after: int, act: Callable[[], None]) -> dict[str, Any]:
    """Generates `count` tokens and calls `act` when `after` of them have come."""
    seen = 0
    with node.stream("generate.run", GENERATE | {"max_tokens": count}) as lines:
        for line in lines:
            if line.get("method") == "generate.token":
                seen += 1
                if seen == after:
                    act()
            elif line.get("id") == 1:
                assert "error" not in line, line
                result: dict[str, Any] = line["result"]
                return result
    raise AssertionError("the stream ended without a result")


def test_a_killed_worker_costs_no_token(make_testnet: MakeTestnet, tiny: Path) -> None:
    net = make_testnet(4)
    _publish(net, tiny, "--wait-replicas", 2)
    expected = open_reference(tiny).generate(PROMPT, 120)
    answer = _generate_and(net["alice"], 120, 20, lambda: net.run("kill", "bob"))
    assert answer["token_ids"] == expected
    # Whether a call was on its way to bob at that moment is chance; tests/services has both cases.
    assert answer["stats"]["retries"] >= 0
    assert net["alice"]("model", "wait", "tiny", "--replicas", 2)["replicas"] >= 2
    net.run("restart", "bob")
    assert net["bob"]("status")["models"] == 1


def test_without_another_holder_the_expert_is_loaded_or_fetched(
    make_testnet: MakeTestnet, tiny: Path
) -> None:
    net = make_testnet(2, "--roles", "main,gpu")
    _publish(net, tiny, "--wait-replicas", 1)
    expected = open_reference(tiny).generate(PROMPT, 80)
    answer = _generate_and(net["alice"], 80, 10, lambda: net.run("kill", "bob"))
    assert answer["token_ids"] == expected
    here = {peer for expert in answer["trace"].values() for peer in expert["peers"]}
    assert net["alice"].peer_id in here


def test_a_dropped_block_is_fetched_where_it_is_and_named_where_it_is_nowhere(
    make_testnet: MakeTestnet, tiny: Path
) -> None:
    net = make_testnet(2, "--hold", "none")
    _publish(net, tiny)
    net["bob"].until("the model", lambda: net["bob"]("status")["models"] == 1)
    net["bob"]("model", "fetch", "tiny")
    block = net["alice"]("model", "show", "tiny")["subjects"]["layer0.expert0"]["block"]
    expected = open_reference(tiny).generate(PROMPT, 40)

    _drop(net, "alice", block)
    assert block in str(blyan("fsck", "--home", net["alice"].home, code=1)["bad"])
    net.run("restart", "alice")
    answer = _generate_and(net["alice"], 40, 1, lambda: None)
    assert answer["token_ids"] == expected
    assert answer["stats"]["fetched_bytes"] > 0
    assert net["alice"]("model", "verify", "tiny")["ok"]

    for name in net.nodes:
        _drop(net, name, block)
    for name in net.nodes:
        net.run("restart", name)
    verified = net["alice"]("model", "verify", "tiny")
    assert {bad["subject"] for bad in verified["bad"]} == {"layer0.expert0"}
    refused = net["alice"](
        "generate", "--model", "tiny", "--prompt-ids", ",".join(map(str, PROMPT)),
        "--max-tokens", 40, "--temperature", 0, "--ignore-eos", code=1,
    )["error"]  # fmt: skip
    assert refused["data"]["expert"] == "layer0.expert0"
    assert refused["data"]["block"] == block


def _drop(net: Testnet, name: str, block: str) -> None:
    if net.refresh()[name].pid:
        net.run("kill", name)
    blyan("block", "drop", block, "--home", net[name].home)


def test_an_update_moves_new_sessions_and_leaves_running_ones(
    make_testnet: MakeTestnet, tiny: Path, tmp_path: Path
) -> None:
    net = make_testnet(3)
    first = _publish(net, tiny, "--wait-replicas", 1)
    alice = net["alice"]
    subject = "layer0.expert1"
    before = alice("model", "show", "tiny")["subjects"][subject]
    exported = tmp_path / "weights.safetensors"
    weights = _weights_of(tiny, alice, subject)
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, exported)
    updated: dict[str, Any] = {}

    def update() -> None:
        updated.update(
            alice(
                "model", "update", "tiny", "--subject", subject, "--weights", exported,
                "--base", before["block"],
            )
        )  # fmt: skip

    running = _generate_and(alice, 100, 10, update)
    assert running["root"] == first["root"]
    assert running["token_ids"] == open_reference(tiny).generate(PROMPT, 100)
    assert running["trace"][subject]["block"] == before["block"]

    later = _generate_and(alice, 100, 1, lambda: None)
    assert later["root"] == updated["root"] != first["root"]
    assert later["trace"][subject]["block"] == updated["block"]
    assert updated["base"] == before["block"]

    old = alice(
        "generate", "--model", "tiny", "--prompt-ids", ",".join(map(str, PROMPT)), "--max-tokens",
        100, "--temperature", 0, "--ignore-eos", "--root", first["root"],
    )  # fmt: skip
    assert old["token_ids"] == running["token_ids"]

    stale = alice(
        "model", "update", "tiny", "--subject", subject, "--weights", exported,
        "--base", before["block"], code=1,
    )["error"]  # fmt: skip
    assert stale["data"]["head"] == updated["block"]


def _weights_of(path: Path, node: Node, subject: str) -> dict[str, torch.Tensor]:
    """The tensors of an expert under the names that `model show` lists."""
    names = node("model", "show", "tiny")["subjects"][subject]["tensors"]
    layer, expert = subject.removeprefix("layer").split(".expert")
    every = {k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}
    found = {}
    for name in names:
        (match,) = (k for k in every if f"layers.{layer}." in k and f"experts.{expert}.{name}" in k)
        found[name] = every[match].clone()
    return found
