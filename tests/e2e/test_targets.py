"""Every node computes for another kind of processor, and the tokens are those of one process."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.kernels.targets import Unsupported, runnable
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Node, blyan
from blyan_node.testing.foreground import Foreground
from blyan_node.testing.reference import open_reference

PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(40)]
NEW = 24


def _targets() -> list[str]:
    try:
        return [target.name for target in runnable()]
    except Unsupported:
        return []


@contextmanager
def _swarm(tmp_path: Path, kernels: dict[str, str], holds: dict[str, str]) -> Iterator[list[Node]]:
    """Alice, who holds nothing, and whoever holds what; all connected to her."""
    network = tmp_path / "network.json"
    blyan("network", "new", "--name", "test", "--out", network)
    with ExitStack() as stack:
        nodes: list[Node] = []
        for name, choice in kernels.items():
            options = ["--network", network, "--kernels", choice]
            if nodes:
                (address, *_) = (a for a in nodes[0].addrs if "127.0.0.1" in a)
                peer = "" if "/p2p/" in address else f"/p2p/{nodes[0].peer_id}"
                options += ["--role", "gpu", "--hold", holds[name], "--bootstrap", address + peer]
            nodes.append(stack.enter_context(Foreground(tmp_path / name, *options)))
        yield nodes


@pytest.mark.skipif("avx2" not in _targets(), reason="this processor has no AVX2")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_node_has_another_target(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(family, tmp_path / "model", dtype="bfloat16")
    config, reference = Checkpoint.open(path).config, open_reference(path)
    experts = [
        (layer, expert)
        for layer in range(len(config.layers))
        for expert in range(config.experts_of(layer))
    ]
    halves = [",".join(f"layer{n}.expert{e}" for n, e in experts if e % 2 == odd) for odd in (0, 1)]
    every = ",".join(f"layer{n}.expert{e}" for n, e in experts)
    kernels = {"alice": _targets()[0], "bob": "fma", "carol": "avx2", "dave": "torch"}
    holds = {"bob": halves[0], "carol": halves[1], "dave": every}
    with _swarm(tmp_path, kernels, holds) as (alice, bob, carol, dave):
        profiles = {node.name: node("status")["profile"] for node in (alice, bob, carol, dave)}
        assert profiles["alice"] == profiles["bob"] == profiles["carol"]
        assert "sums3" in profiles["alice"] and "torch" in profiles["dave"]

        alice("model", "publish", path, "--name", "tiny")
        for node, held in ((bob, halves[0]), (carol, halves[1]), (dave, every)):
            count = held.count(",") + 1
            node.until("held", lambda n=node, c=count: n("status")["held"]["experts"] == c)
        alice("model", "wait", "tiny", "--replicas", 1)

        ids = ",".join(map(str, PROMPT))
        alice("forward", "--model", "tiny", "--prompt-ids", ids, "--out", tmp_path / "pass")
        logits, _ = reference.forward(PROMPT)
        assert torch.equal(load_file(tmp_path / "pass")["logits"], logits)
        answer = alice(
            "generate", "--model", "tiny", "--prompt-ids", ids,
            "--max-tokens", NEW, "--temperature", 0, "--ignore-eos",
        )  # fmt: skip
        assert answer["token_ids"] == reference.generate(PROMPT, NEW)
        peers = {peer for expert in answer["trace"].values() for peer in expert["peers"]}
        assert peers == {bob.peer_id, carol.peer_id}


def test_kernels_that_do_not_run_here_are_refused_in_one_line(tmp_path: Path) -> None:
    missing = next((name for name in ("avx512", "avx2", "fma") if name not in _targets()), None)
    if missing is None:
        pytest.skip("this processor runs all of them")
    refused = blyan(
        "start", "--home", tmp_path / "alice", "--listen", "/ip4/127.0.0.1/tcp/0",
        "--kernels", missing, code=1,
    )  # fmt: skip
    assert f"the {missing} kernels do not run on this machine" in str(refused)
