"""What the command says: documents, errors, progress, streams, Ctrl-C, and how it finds a node."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from cli import show
from cli.main import run
from cli.shared import absolute
from protocols.dag.genesis import Genesis
from protocols.errors import ErrorCode, Refused
from protocols.rpc.generate import (
    GenerateResult,
    GenerateStats,
    SamplingUsed,
    Token,
    TraceEntry,
)
from protocols.rpc.model import DryRunResult, PublishResult, ShowResult, SubjectInfo, WaitResult
from protocols.rpc.node import Held, StatusResult, Syncing
from protocols.rpc.table import METHODS

Command = Callable[..., Any]

STATUS = StatusResult(
    peer_id="12D3alice",
    role="main",
    network="bafkreinet",
    version="0.1.0",
    commit="c" * 40,
    addrs=["/ip4/127.0.0.1/tcp/4040/p2p/12D3alice"],
    peers=3,
    blocks=29,
    models=1,
    held=Held(experts=2, bytes=2048),
    stored_bytes=3 * 2**20,
    syncing=Syncing(have=10, want=20, eta_s=2.5),
    profile="cpu-sums3-int8",
    precision="int8",
)
STATS = GenerateStats(
    prompt_tokens=3,
    new_tokens=2,
    prefill_s=0.1,
    decode_s=0.2,
    tokens_per_s=10.0,
    max_gap_s=0.1,
    remote_calls=4,
    bytes_sent=1,
    bytes_received=2,
    retries=0,
    fetched_bytes=0,
)


SAMPLING = SamplingUsed(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=None
)


def _answer(finish: str = "length") -> GenerateResult:
    return GenerateResult(
        token_ids=[5, 6],
        text="Hi there",
        root="ab" * 32,
        finish=finish,  # type: ignore[arg-type]
        sampling=SAMPLING,
        trace={"layer0.expert1": TraceEntry(block="bafkrei", peers={"12D3bob": 2})},
        stats=STATS,
        profile="cpu-sums3-int8",
    )


def test_json_is_one_document_of_the_result(node: Any, command: Command) -> None:
    node.answers["node.status"] = lambda request, context: STATUS
    said = command("--json", "status")
    assert said.code == 0
    assert said.json == msgspec.to_builtins(STATUS)
    assert said.out.count("\n") == 1


def test_people_get_lines(node: Any, command: Command) -> None:
    node.answers["node.status"] = lambda request, context: STATUS
    said = command("status")
    assert "12D3alice" in said.out
    assert "3.0 MiB" in said.out
    assert "10 of 20 blocks, about 2 s left" in said.out


def test_what_is_never_computed_is_told_and_its_names_are_not(node: Any, command: Command) -> None:
    there = SubjectInfo(block="bafkrei", tensors=["a.weight", "b.weight"], bytes=5, computed=True)
    kept = msgspec.structs.replace(there, bytes=2**20, computed=False)
    shown = ShowResult(
        name="m", model="bafy", author="12D3", family="deepseek_v3", root="ab" * 32, experts=0,
        held=0, bytes=9, subjects={"layer0.mlp": there, "layer61.mtp": kept},
    )  # fmt: skip
    node.answers["model.show"] = lambda request, context: shown
    lines = command("model", "show", "m").out.splitlines()
    assert any("layer0.mlp" in line and "a.weight b.weight" in line for line in lines)
    (line,) = (line for line in lines if "layer61.mtp" in line)
    assert "2 tensors, kept and exported but never computed" in line
    rehearsed = DryRunResult(
        model=None, name="m", experts=0, blocks=4, bytes=2**21, reused_bytes=0, new_bytes=2**21,
        room_bytes=2**30, seconds=1.0, read_bytes_per_s=1, write_bytes_per_s=1, kept_bytes=2**20,
    )  # fmt: skip
    node.answers["model.dry_run"] = lambda request, context: rehearsed
    said = command("model", "publish", "m", "--name", "m", "--dry-run").out
    assert "1.0 MiB of it, kept and exported" in said and "about 1.0 s" in said
    rehearsed = msgspec.structs.replace(rehearsed, seconds=None, write_bytes_per_s=None)
    said = command("model", "publish", "m", "--name", "m", "--dry-run").out
    assert "would take" in said and "not known: the disk had no room for a trial" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("--home", "{home}", "--json", "status"),
        ("status", "--home", "{home}", "--json"),
        ("--json", "status", "--rpc", "{home}/rpc.sock"),
        ("--rpc", "{home}/rpc.sock", "status", "--json"),
    ],
)
def test_shared_options_go_before_and_after(
    node: Any,
    command: Command,
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BLYAN_HOME", str(tmp_path / "elsewhere"))
    node.answers["node.status"] = lambda request, context: STATUS
    said = command(*(word.format(home=node.path.parent) for word in arguments))
    assert said.code == 0
    assert said.json["peer_id"] == "12D3alice"


def test_they_go_between_a_group_and_its_command_too(node: Any, command: Command) -> None:
    node.answers["model.wait"] = lambda request, context: WaitResult(replicas=2)
    said = command("model", "--json", "wait", "tiny", "--replicas", "2")
    assert said.json == {"replicas": 2}


def test_the_environment_names_the_socket(
    node: Any, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.answers["node.status"] = lambda request, context: STATUS
    monkeypatch.setenv("BLYAN_HOME", str(tmp_path / "elsewhere"))
    assert command("status").code == 2
    monkeypatch.setenv("BLYAN_RPC", str(node.path))
    assert command("status").code == 0


def test_without_a_node_it_is_exit_2(command: Command) -> None:
    said = command("status", "--json")
    assert said.code == 2
    assert "no node answers" in said.json["error"]["message"]
    assert "next: start one" in said.err


def test_a_refusal_is_exit_1_with_what_why_and_next(node: Any, command: Command) -> None:
    def refuse(request: Any, context: Any) -> None:
        raise Refused(
            ErrorCode.STALE_BASE, "not updated", "the head moved", "try again", {"head": "bafk"}
        )

    node.answers["model.update"] = refuse
    said = command(
        "model", "update", "tiny", "--subject", "layer0.expert0", "--weights", "w", "--json"
    )
    assert said.code == 1
    assert said.err.splitlines() == [
        "error: not updated",
        "  why: the head moved",
        "  next: try again",
    ]
    assert said.json["error"]["code"] == 3
    assert said.json["error"]["data"]["head"] == "bafk"


def test_a_bug_in_the_node_is_no_traceback_here(node: Any, command: Command) -> None:
    node.answers["node.status"] = lambda request, context: 1 / 0
    said = command("status")
    assert said.code == 1
    assert "failed inside the node" in said.err


def test_paths_are_made_absolute(node: Any, command: Command) -> None:
    result = PublishResult(
        model="b", name="tiny", root="r", blocks=1, experts=1, bytes=10, reused_bytes=4
    )
    node.answers["model.publish"] = lambda request, context: result
    assert command("model", "publish", "some/where", "--name", "tiny").code == 0
    ((_, request),) = node.asked
    assert request.path == os.path.join(os.getcwd(), "some/where")
    assert absolute("~/x") == os.path.expanduser("~/x")


def test_progress_is_plain_lines_on_stderr_and_not_on_stdout(node: Any, command: Command) -> None:
    def publish(request: Any, context: Any) -> PublishResult:
        context.progress(0, 100, "tiny")
        context.progress(100, 100, "tiny")
        return PublishResult(
            model="b", name="tiny", root="r", blocks=1, experts=1, bytes=100, reused_bytes=0
        )

    node.answers["model.publish"] = publish
    said = command("model", "publish", "x", "--name", "tiny", "--json")
    assert said.err.splitlines() == ["tiny: 0 of 100 bytes (0 %)", "tiny: 100 of 100 bytes (100 %)"]
    assert said.json["name"] == "tiny"


def test_generate_streams_its_text(node: Any, command: Command) -> None:
    def generate(request: Any, context: Any) -> GenerateResult:
        context.notify(Token(token_id=5, text="Hi"))
        context.notify(Token(token_id=6, text=" there"))
        return _answer()

    node.answers["generate.run"] = generate
    said = command("generate", "--model", "tiny", "Hello", "--max-tokens", 2, "--seed", 1)
    assert said.out == "Hi there\n"
    assert "10.0 tokens/s" in said.err
    assert command("generate", "--model", "tiny", "Hello", "--json").json["token_ids"] == [5, 6]
    (_, request), _ = node.asked
    assert (request.prompt, request.max_tokens, request.seed) == ("Hello", 2, 1)
    assert (request.temperature, request.top_p, request.chat) == (None, None, False)


def test_ids_are_printed_where_there_is_no_text(node: Any, command: Command) -> None:
    def generate(request: Any, context: Any) -> GenerateResult:
        context.notify(Token(token_id=5, text=None))
        return _answer()

    node.answers["generate.run"] = generate
    assert command("generate", "--model", "tiny", "--prompt-ids", "1, 2").out == "5 \n"
    ((_, request),) = node.asked
    assert request.prompt_ids == [1, 2]


def _cancellable(node: Any) -> threading.Event:
    """A `generate.run` that goes on until it is cancelled."""
    started = threading.Event()

    async def generate(request: Any, context: Any) -> GenerateResult:
        ended = trio.Event()
        context.on_cancel(ended.set)
        context.notify(Token(token_id=5, text="Hi"))
        started.set()
        await ended.wait()
        return _answer("cancelled")

    node.answers["generate.run"] = generate
    return started


def test_ctrl_c_ends_the_request_and_prints_what_came(node: Any) -> None:
    started = _cancellable(node)
    line = [sys.executable, "-m", "cli.main", "--rpc", str(node.path), "--json"]
    with subprocess.Popen(
        [*line, "generate", "--model", "tiny", "p"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert started.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(out)["finish"] == "cancelled"
    assert b"Traceback" not in err


def test_ctrl_c_ends_other_commands_with_a_word(node: Any) -> None:
    started, ended = threading.Event(), threading.Event()

    async def wait(request: Any, context: Any) -> WaitResult:
        started.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    node.answers["model.wait"] = wait
    line = [sys.executable, "-m", "cli.main", "--rpc", str(node.path)]
    with subprocess.Popen(
        [*line, "model", "wait", "tiny", "--replicas", "1"], stderr=subprocess.PIPE
    ) as process:
        assert started.wait(30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == b"error: interrupted"
    assert ended.wait(30)


def test_any_method_can_be_called(node: Any, command: Command) -> None:
    node.answers["model.wait"] = lambda request, context: WaitResult(replicas=2)
    said = command("rpc", "model.wait", '{"model": "tiny", "replicas": 2}', "--json")
    assert said.json == {"replicas": 2}
    assert command("rpc", "model.wait", "{}").code == 1
    assert command("rpc", "no.method").code == 1


def test_verbose_says_what_is_asked(node: Any, command: Command) -> None:
    node.answers["node.status"] = lambda request, context: STATUS
    assert "node.status {}" in command("-v", "status").err


def test_a_network_is_founded_once(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    made = command("network", "new", "--name", "ours", "--out", path, "--json")
    assert made.json == json.loads(path.read_text())
    assert Genesis.from_json(path.read_text()).name == "ours"
    again = command("network", "new", "--name", "ours", "--out", path, "--json")
    assert again.code == 1
    assert again.json["error"]["data"]["path"] == str(path)


def test_two_networks_of_one_name_differ(command: Command, tmp_path: Path) -> None:
    ids = [
        command("network", "new", "--name", "n", "--out", tmp_path / out, "--json").json["id"]
        for out in ("a", "b")
    ]
    assert ids[0] != ids[1]


def test_what_answers_need_not_be_a_node(tmp_path: Path, command: Command) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def babble() -> None:
            link, _ = server.accept()
            with link:
                link.recv(1000)
                link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        said = command("--rpc", path, "status")
        thread.join()
    assert said.code == 2
    assert "is no node" in said.err


def test_a_node_that_goes_away_is_exit_2(node: Any, command: Command) -> None:
    async def leave(request: Any, context: Any) -> None:
        context.client._stream.socket.shutdown(socket.SHUT_RDWR)
        await trio.sleep_forever()

    node.answers["node.status"] = leave
    said = command("status")
    assert said.code == 2
    assert "went away" in said.err


def test_the_command_is_thin() -> None:
    program = (
        "import sys; from cli.main import run; run(['status', '--home', '/nowhere']);"
        "bad = {'torch', 'libp2p', 'trio', 'numpy', 'nacl', 'plyvel', 'storage', 'blyan_node'};"
        "sys.exit(9 if bad & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**50, "1024.0 TiB")]
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert show.size(count) == text


def test_every_method_has_a_command_or_is_for_programs() -> None:
    import cli

    folder = Path(cli.__file__).parent
    source = "\n".join(path.read_text() for path in folder.rglob("*.py"))
    for_programs = {"rpc.discover", "rpc.cancel", "network.show", "node.doctor"}
    for name in METHODS:
        assert f'"{name}"' in source or name in for_programs, name


def test_run_returns_an_exit_code(tmp_path: Path) -> None:
    assert run(["--home", str(tmp_path), "status"]) == 2
