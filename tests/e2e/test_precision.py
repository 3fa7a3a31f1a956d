"""Daemons that hold in a precision of their operator's choice."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Node, blyan
from blyan_node.testing.foreground import Foreground
from blyan_node.testing.reference import open_reference
from protocols.precision import Precision

PROMPT = [3, 17, 42, 5, 9, 23, 31, 8, 64, 12, 90, 33]
ASKED = ("--model", "tiny", "--prompt-ids", ",".join(map(str, PROMPT)))
ALL = [f"layer{layer}.expert{expert}" for layer in range(3) for expert in range(6)]
# What each daemon holds, and in which precision; alice is main.
HOLDS: dict[str, tuple[Precision, list[str]]] = {
    "bob": ("int8", ALL[::2]),
    "carol": ("int8", ALL[1::2]),
    "dave": ("as-published", ALL),
}

Nodes = dict[str, Node]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Nodes]:
    homes = tmp_path_factory.mktemp("mixed")
    network = homes / "network.json"
    blyan("network", "new", "--name", "mixed", "--out", network)
    with ExitStack() as stack:

        def start(name: str, *options: object) -> Node:
            return stack.enter_context(Foreground(homes / name, "--network", network, *options))

        alice = start("alice", "--role", "main", "--precision", "int8")
        (address, *_) = (each for each in alice.addrs if "127.0.0.1" in each)
        if "/p2p/" not in address:
            address = f"{address}/p2p/{alice.peer_id}"
        alice("model", "publish", model, "--name", "tiny")
        made = {"alice": alice}
        for name, (precision, subjects) in HOLDS.items():
            made[name] = start(
                name, "--role", "gpu", "--bootstrap", address, "--hold", ",".join(subjects),
                *([] if precision == "as-published" else ["--precision", precision]),
            )  # fmt: skip
        alice.until("two holders for each expert", lambda: _holders(alice) == 2 * len(ALL))
        yield made


def _holders(node: Node) -> int:
    return sum(len(expert["holders"]) for expert in node("expert", "list")["experts"])


def _workers(result: dict[str, Any]) -> set[str]:
    return {peer for entry in result["trace"].values() for peer in entry["peers"]}


def _forward(node: Node, out: Path, *options: object) -> tuple[torch.Tensor, dict[str, Any]]:
    result = node("forward", *ASKED, "--out", out, *options)
    return load_file(out)["logits"], result


def test_main_and_workers_at_int8_have_the_bits_of_one_process(
    nodes: Nodes, model: Path, tmp_path: Path
) -> None:
    truth = open_reference(model, precision="int8")
    logits, result = _forward(nodes["alice"], tmp_path / "out")
    assert torch.equal(logits, truth.forward(PROMPT)[0])
    assert _workers(result) == {nodes["bob"].peer_id, nodes["carol"].peer_id}
    answer = nodes["alice"]("generate", *ASKED, "--max-tokens", 12, "--ignore-eos")
    assert answer["token_ids"] == truth.generate(PROMPT, 12)
    assert answer["profile"] == result["profile"] == nodes["bob"]("status")["profile"]


def test_what_was_published_is_computed_by_those_who_hold_it_so(
    nodes: Nodes, model: Path, tmp_path: Path
) -> None:
    truth = open_reference(model)
    demand = ("--precision", "as-published")
    logits, result = _forward(nodes["alice"], tmp_path / "out", *demand)
    assert torch.equal(logits, truth.forward(PROMPT)[0])
    assert _workers(result) == {nodes["dave"].peer_id}
    answer = nodes["alice"]("generate", *ASKED, "--max-tokens", 12, "--ignore-eos", *demand)
    assert answer["token_ids"] == truth.generate(PROMPT, 12)
    assert answer["profile"] == nodes["dave"]("status")["profile"]


def test_everybody_is_told_who_holds_in_what(nodes: Nodes) -> None:
    said = {name: node("status") for name, node in nodes.items()}
    precisions = {name: each["precision"] for name, each in said.items()}
    assert precisions == {"alice": "int8", "bob": "int8", "carol": "int8", "dave": "as-published"}
    profiles = {each["peer_id"]: each["profile"] for each in said.values()}
    assert profiles[nodes["bob"].peer_id] == profiles[nodes["alice"].peer_id]
    assert profiles[nodes["bob"].peer_id].endswith("-int8")
    for expert in nodes["alice"]("expert", "list")["experts"]:
        for holder in expert["holders"]:
            assert holder["profile"] == profiles[holder["peer_id"]]
    stats = {name: nodes[name]("expert", "stats") for name in ("bob", "dave")}
    stored = {name: {e["storage"] for e in each["experts"]} for name, each in stats.items()}
    assert stored == {"bob": {"int8"}, "dave": {"float32"}}
    memory = {name: each["memory"] for name, each in stats.items()}
    assert memory["bob"]["copied"] == memory["bob"]["experts"]
    assert (memory["bob"]["packs"], memory["dave"]["copied"]) == (0, 0)
    assert (
        memory["bob"]["experts"] / len(HOLDS["bob"][1]) < memory["dave"]["experts"] / len(ALL) / 3
    )


def test_what_is_exported_is_what_was_published(nodes: Nodes, model: Path, tmp_path: Path) -> None:
    for name in ("alice", "bob"):
        nodes[name]("model", "export", "tiny", tmp_path / name)
        assert _tensors(tmp_path / name) == _tensors(model)


def _tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        name: (str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes())
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
