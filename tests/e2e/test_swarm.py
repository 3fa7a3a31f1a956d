"""How nodes find each other, catch up, and come back."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Node, Testnet, blyan, kill
from blyan_node.testing.reference import open_reference

PROMPT = [3, 17, 42, 5, 9, 23, 31, 8]
MakeTestnet = Callable[..., Testnet]


@contextmanager
def daemon(home: Path, *options: object, ends: int = 0) -> Iterator[Node]:
    """One daemon in the foreground of this test; at the end it is interrupted and must exit 0.

    A test that kills it says so with `ends=-SIGKILL`.
    """
    arguments = ["start", "--home", home, "--listen", "/ip4/127.0.0.1/tcp/0", *options, "--json"]
    with (home.parent / f"{home.name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, (home.parent / f"{home.name}.log").read_text()[-3000:]
        ready: dict[str, Any] = json.loads(first)
        assert ready["event"] == "ready"
        document = blyan("--home", home, "status")
        yield Node(
            home.name, home, ready["rpc"], document["peer_id"], document["addrs"],
            process.pid, document["role"],
        )  # fmt: skip
        if ends == 0:
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == ends
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def _address(node: Node) -> str:
    (address, *_) = (a for a in node.addrs if "127.0.0.1" in a)
    return address if "/p2p/" in address else f"{address}/p2p/{node.peer_id}"


def _genesis(tmp_path: Path) -> Path:
    path = tmp_path / "network.json"
    blyan("network", "new", "--name", "test", "--out", path)
    return path


def _names(node: Node) -> set[str]:
    return {model["name"] for model in node("model", "list")["models"]}


def test_nodes_that_published_apart_end_with_the_union(tmp_path: Path) -> None:
    network = _genesis(tmp_path)
    for index, name in enumerate(("alice", "bob")):
        path = make_checkpoint("mixtral", tmp_path / f"model-{name}", seed=index)
        with daemon(tmp_path / name, "--network", network, "--role", "main") as node:
            node("model", "publish", path, "--name", f"of-{name}")
    with (
        daemon(tmp_path / "alice") as alice,
        daemon(tmp_path / "bob", "--bootstrap", _address(alice)) as bob,
    ):
        for node in (alice, bob):
            node.until("both models", lambda n=node: _names(n) == {"of-alice", "of-bob"})
        assert alice("chain", "heads") == bob("chain", "heads")


def test_a_fork_made_apart_is_settled_alike_and_shown(tmp_path: Path) -> None:
    network = _genesis(tmp_path)
    path = make_checkpoint("mixtral", tmp_path / "model")
    homes = {name: tmp_path / name for name in ("alice", "bob")}
    with daemon(homes["alice"], "--network", network, "--role", "main") as alice:
        alice("model", "publish", path, "--name", "tiny")
        base = alice("model", "show", "tiny")["subjects"]["layer0.expert0"]["block"]
        with daemon(homes["bob"], "--network", network, "--role", "main",
                    "--bootstrap", _address(alice)) as bob:  # fmt: skip
            bob.until("the model", lambda: _names(bob) == {"tiny"})
            bob("model", "fetch", "tiny")
    # The model's author works on two machines: the same key, each with a change of its own.
    identity = (homes["alice"] / "identity.key").read_bytes()
    (homes["bob"] / "identity.key").write_bytes(identity)
    for index, name in enumerate(homes):
        with daemon(homes[name]) as node:
            weights = _changed(path, node, tmp_path / f"{name}.safetensors", 0.5 + index)
            node("model", "update", "tiny", "--subject", "layer0.expert0",
                 "--weights", weights, "--base", base)  # fmt: skip
    seed = blyan("init", "--home", tmp_path / "fresh", "--network", network)
    assert seed["peer_id"]
    (homes["bob"] / "identity.key").write_bytes((tmp_path / "fresh/identity.key").read_bytes())
    with (
        daemon(homes["alice"]) as alice,
        daemon(homes["bob"], "--bootstrap", _address(alice)) as bob,
    ):
        for node in (alice, bob):
            node.until("the fork", lambda n=node: len(_heads(n)["forks"]) == 1)
        assert _heads(alice) == _heads(bob)


def _heads(node: Node) -> dict[str, Any]:
    (model,) = node("chain", "heads")["models"]
    heads: dict[str, Any] = model
    return heads


def _changed(path: Path, node: Node, out: Path, factor: float) -> Path:
    from safetensors.torch import load_file, save_file

    names = node("model", "show", "tiny")["subjects"]["layer0.expert0"]["tensors"]
    every = {k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}
    chosen = {
        name: next(v for k, v in every.items() if "layers.0." in k and f"experts.0.{name}" in k)
        for name in names
    }
    save_file({name: (tensor * factor).contiguous() for name, tensor in chosen.items()}, out)
    return out


def test_a_late_node_catches_up_from_several_and_resumes(
    make_testnet: MakeTestnet, tmp_path: Path
) -> None:
    net = make_testnet(3, "--hold", "none")
    path = make_checkpoint("mixtral", tmp_path / "model", hidden_size=256, intermediate_size=1024)
    published = net["alice"]("model", "publish", path, "--name", "tiny")
    for name in ("bob", "carol"):
        _until_released(net[name], published["root"])
        net[name]("model", "fetch", "tiny")
    network = net.refresh().run("status")["network"]
    options = ("--network", network, "--role", "gpu", "--hold", "none",
               "--bootstrap", _address(net["alice"]))  # fmt: skip
    total = published["bytes"]
    with daemon(tmp_path / "erin", *options, ends=-signal.SIGKILL) as erin:
        erin.until("every header", lambda: erin("status")["blocks"] == _blocks(net["alice"]))
        with erin.stream("model.fetch", {"model": "tiny"}) as lines:
            for line in lines:
                if line.get("method") == "progress" and line["params"]["done"] > total // 3:
                    break
        assert erin.pid
        kill(erin.pid)
    with daemon(tmp_path / "erin", *options) as erin:
        had = erin("status")["stored_bytes"]
        assert had > 0
        erin.until("three peers", lambda: len(erin("peers")["peers"]) == 3)
        fetched = erin("model", "fetch", "tiny")
        assert fetched["bytes"] <= total - had + 8 * 8 * 256 * 1024
        assert len([n for n in fetched["peers"].values() if n]) > 1
        assert erin("model", "verify", "tiny")["ok"]


def _until_released(node: Node, root: str) -> None:
    """Publishing ends when the publisher has the release; others hear of it a moment later."""
    node.until(
        "the release", lambda: [m["root"] for m in node("model", "list")["models"]] == [root]
    )


def _blocks(node: Node) -> int:
    blocks: int = node("status")["blocks"]
    return blocks


def test_a_second_main_node_answers_at_its_first_request(
    make_testnet: MakeTestnet, tmp_path: Path
) -> None:
    net = make_testnet(4, "--roles", "main,gpu,gpu,main")
    path = make_checkpoint("mixtral", tmp_path / "model")
    net["alice"]("model", "publish", path, "--name", "tiny", "--wait-replicas", 2)
    answer = net["dave"](
        "generate", "--model", "tiny", "--prompt-ids", ",".join(map(str, PROMPT)),
        "--max-tokens", 16, "--temperature", 0, "--ignore-eos",
    )  # fmt: skip
    assert answer["token_ids"] == open_reference(path).generate(PROMPT, 16)


def test_a_second_daemon_on_one_home_is_refused_in_one_line(tmp_path: Path) -> None:
    with daemon(tmp_path / "alice") as alice:
        second = subprocess.run(
            [sys.executable, "-m", "cli.main", "start", "--home", str(alice.home)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1
        assert len(second.stderr.strip().splitlines()) == 1, second.stderr
        assert alice("status")["peer_id"] == alice.peer_id


def test_sixteen_nodes_are_all_connected_and_hear_a_release(
    make_testnet: MakeTestnet, tmp_path: Path
) -> None:
    net = make_testnet(16)
    for node in net.nodes.values():
        assert len(node("peers")["peers"]) == 15
    path = make_checkpoint("mixtral", tmp_path / "model")
    root = net["alice"]("model", "publish", path, "--name", "tiny")["root"]
    for node in net.nodes.values():
        _until_released(node, root)
