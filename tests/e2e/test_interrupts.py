"""Ctrl-C of every long command, and each way to end a daemon that is busy."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from blyan_node.bench.models import write_model
from blyan_node.testing.daemons import Node, Testnet, alive
from blyan_node.testing.foreground import ENDS_S_MAX, Command, Foreground, command
from protocols.errors import ErrorCode
from protocols.tensors.manifest import Dtype

INTERRUPTED = 130
PROMPT = "3,17,42,5"
ENDLESS = ("--max-tokens", 60_000, "--temperature", 0, "--ignore-eos")
SHORT = ("--max-tokens", 4, "--temperature", 0, "--ignore-eos")
SMALL: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
LARGE = SMALL | {"hidden_size": 512, "intermediate_size": 2048, "num_local_experts": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, which answers, and `large` and `other` of 200 MB, which take a while to move."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "small", Dtype.F32, **SMALL)
    write_model(folder / "large", Dtype.BF16, **LARGE)
    write_model(folder / "other", Dtype.BF16, **LARGE | {"intermediate_size": 2080})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Testnet]:
    """Alice, who has published `small` and `large`, and bob; nobody takes experts by itself."""
    net = Testnet(tmp_path_factory.mktemp("net"))
    net.run("up", "--nodes", 2, "--roles", "main,main", "--hold", "none")
    for name in ("small", "large"):
        net["alice"]("model", "publish", models / name, "--name", name)
    net["bob"].until("the models", lambda: net["bob"]("status")["models"] == 2)
    yield net
    net.run("down")


def _ends_well(running: Command) -> None:
    assert running.interrupted() == INTERRUPTED, (running.out, running.err)
    assert b"Traceback" not in running.out + running.err


def _answers(node: Node) -> None:
    answer = node("generate", "--model", "small", "--prompt-ids", PROMPT, *SHORT)
    assert len(answer["token_ids"]) == 4


def test_of_generate_keeps_what_came(pair: Testnet) -> None:
    alice = pair["alice"]
    with command(
        alice, "generate", "--model", "small", "--prompt-ids", PROMPT, *ENDLESS
    ) as running:
        running.until(b" ")
        _ends_well(running)
        assert b" tokens, " in running.err
    _answers(alice)


def test_of_publish_keeps_what_was_stored(pair: Testnet, models: Path) -> None:
    bob = pair["bob"]
    publish = ("model", "publish", models / "other", "--name", "mine")
    with command(bob, *publish) as running:
        running.until(b"mine: ")
        _ends_well(running)
    assert "mine" not in {model["name"] for model in bob("model", "list")["models"]}
    published = bob(*publish)
    assert 0 < published["reused_bytes"] < published["bytes"]
    with command(bob, *publish, "--wait-replicas", 9) as running:
        running.until(b"replicas: ")
        _ends_well(running)
    _answers(bob)


def test_of_fetch_keeps_what_came(pair: Testnet) -> None:
    bob = pair["bob"]
    total = next(m for m in bob("model", "list")["models"] if m["name"] == "large")["bytes"]
    had = bob.call("node.status", {})["stored_bytes"]
    with command(bob, "model", "fetch", "large") as running:
        running.until(b"fetch: ")
        while bob.call("node.status", {})["stored_bytes"] == had:
            assert running.process.poll() is None, "it has ended and nothing came"
        _ends_well(running)
    kept = bob.call("node.status", {})["stored_bytes"] - had
    assert 0 < kept < total
    assert bob("model", "fetch", "large")["bytes"] <= total - kept
    assert bob("model", "verify", "large")["ok"]
    _answers(bob)


def test_of_waiting(pair: Testnet) -> None:
    waiting = ("model", "wait", "small", "--replicas", 9)
    with command(pair["alice"], *waiting, "--json") as running:
        running.until(b"replicas: ")
        _ends_well(running)
        assert json.loads(running.out)["error"]["code"] == ErrorCode.CANCELLED
    _answers(pair["alice"])


def test_of_events(pair: Testnet) -> None:
    alice, bob = pair["alice"], pair["bob"]
    held = False

    def happen() -> None:
        nonlocal held
        bob("expert", *(("drop", "--force") if held else ("hold",)), "layer0.expert0",
            "--model", "small")  # fmt: skip
        held = not held

    with command(alice, "events") as running:
        running.until(b"experts", happen)
        _ends_well(running)
    _answers(alice)


def test_of_a_verify(pair: Testnet) -> None:
    with command(pair["alice"], "model", "verify", "large") as running:
        running.until(b"verify: ")
        _ends_well(running)
    _answers(pair["alice"])


def test_a_second_one_does_not_wait_for_the_node(pair: Testnet) -> None:
    alice = pair["alice"]
    assert alice.pid is not None
    with command(alice, "model", "wait", "small", "--replicas", 9) as running:
        running.until(b"replicas: ")
        os.kill(alice.pid, signal.SIGSTOP)
        try:
            while running.process.poll() is None:
                running.process.send_signal(signal.SIGINT)  # two at once may count as one
                with suppress(subprocess.TimeoutExpired):
                    running.process.wait(0.5)
            assert running.process.returncode == INTERRUPTED
        finally:
            os.kill(alice.pid, signal.SIGCONT)
    _answers(alice)


def _by_signal(number: signal.Signals) -> Callable[[Node], None]:
    def end(node: Node) -> None:
        assert node.pid is not None
        os.kill(node.pid, number)

    return end


def _by_command(node: Node) -> None:
    assert node.pid is not None
    node("stop")
    assert not alive(node.pid), "`stop` returns when the node is gone"


ENDINGS = {
    "SIGINT": _by_signal(signal.SIGINT),
    "SIGTERM": _by_signal(signal.SIGTERM),
    "stop": _by_command,
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_busy_daemon_ends(pair: Testnet, models: Path, tmp_path: Path, ending: str) -> None:
    """It generates, fetches and publishes at once; what is told to the clients is an error."""
    alice = pair["alice"]
    network = pair.run("status")["network"]
    daemon = Foreground(
        tmp_path / "carol", "--network", network, "--role", "main", "--bootstrap", alice.addrs[0]
    )
    with daemon as carol, ExitStack() as stack:
        carol.until("the models", lambda: len(carol("model", "list")["models"]) >= 2)
        _answers(carol)
        busy = {
            "generate.run": {"model": "small", "prompt_ids": [3, 17], "max_tokens": 60_000,
                             "temperature": 0, "ignore_eos": True},
            "model.fetch": {"model": "large"},
            "model.publish": {"path": str(models / "other"), "name": "mine"},
        }  # fmt: skip
        streams = {}
        for method, params in busy.items():
            streams[method] = stack.enter_context(carol.stream(method, params))
            assert "method" in next(streams[method]), method
        ENDINGS[ending](carol)
        daemon.ends()
        for method, lines in streams.items():
            assert not [line for line in lines if "result" in line], method
    assert daemon.fsck()["ok"]


def test_a_daemon_that_just_starts_can_be_ended(tmp_path: Path) -> None:
    daemon = Foreground(tmp_path / "erin")
    with daemon as erin:
        _by_signal(signal.SIGTERM)(erin)
        daemon.ends()


def test_a_daemon_that_is_not_ready_yet_can_be_ended(tmp_path: Path) -> None:
    """Its home is made and the engine is being imported."""
    daemon = Foreground(tmp_path / "frank")
    try:
        while not (tmp_path / "frank" / "config.toml").exists():
            assert daemon.process.poll() is None
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.process.wait(ENDS_S_MAX) in (0, INTERRUPTED)
    finally:
        daemon.__exit__(None, None, None)
    assert "Traceback" not in daemon.log.read_text()


def test_stop_does_not_wait_for_a_disk_that_hangs(pair: Testnet, tmp_path: Path) -> None:
    """A thread of the node writes to a pipe that is full, as it would to a dead network disk."""
    os.mkfifo(tmp_path / "out.partial")
    pipe = os.open(tmp_path / "out.partial", os.O_RDONLY | os.O_NONBLOCK)
    daemon = Foreground(
        tmp_path / "grace", "--network", pair.run("status")["network"], "--role", "main",
        "--bootstrap", pair["alice"].addrs[0],
    )  # fmt: skip
    with daemon as grace:
        grace.until("the models", lambda: len(grace("model", "list")["models"]) >= 2)
        params = {"model": "small", "prompt_ids": [3] * 400, "out": str(tmp_path / "out")}
        with grace.stream("forward.run", params):
            poll = select.poll()
            poll.register(pipe, select.POLLIN)
            assert poll.poll(60_000), "nothing was written"
            grace("stop")
            assert daemon.process.wait(ENDS_S_MAX) == 0
    os.close(pipe)
    assert daemon.fsck()["ok"]
