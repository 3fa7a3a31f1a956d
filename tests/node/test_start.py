"""The daemon as a process: readiness, one per home, signals, and a clean end."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blyan_node.home import create_home
from blyan_node.moe import devices
from blyan_node.rpc.ask import ask

BLYAN = (sys.executable, "-m", "cli.main")
START = ("start", "--listen", "/ip4/127.0.0.1/tcp/0", "--threads", "1", "--memory", "64MiB")
END_S = 30


def _run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BLYAN, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


@contextmanager
def _daemon(home: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A daemon that is ready, with its readiness line."""
    line = [*BLYAN, *START, "--home", str(home), "--json", *map(str, options)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_a_daemon_lives_from_its_readiness_line_to_a_clean_end(tmp_path: Path) -> None:
    home = tmp_path / "alice"
    with _daemon(home, "--role", "gpu") as (process, ready):
        assert ready["event"] == "ready"
        assert ready["role"] == "gpu"
        assert ready["addrs"][0].startswith("/ip4/127.0.0.1/tcp/")
        assert ask(home / "rpc.sock", "node.id", {})["peer_id"] == ready["peer_id"]

        second = _run("start", "--home", home)
        assert second.returncode == 1
        assert second.stderr.startswith("error: ")
        assert "Traceback" not in second.stderr

        _babble(home / "rpc.sock")
        assert ask(home / "rpc.sock", "node.status", {})["peer_id"] == ready["peer_id"]

        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=END_S)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert all(json.loads(line)["event"] == "log" for line in rest.splitlines())
    assert not (home / "rpc.sock").exists()


def _babble(path: Path) -> None:
    rng = random.Random(7)
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(str(path))
            link.sendall(rng.randbytes(rng.randint(1, 10_000)))


@pytest.mark.slow
def test_stop_returns_when_the_daemon_is_gone(tmp_path: Path) -> None:
    with _daemon(tmp_path / "alice") as (process, ready):
        assert ready["role"] == "main"
        stopped = _run("stop", "--home", tmp_path / "alice", "--json")
        assert json.loads(stopped.stdout) == {"stopping": True}
        process.communicate(timeout=END_S)
    assert process.returncode == 0


@pytest.mark.slow
def test_sigterm_drains_too_and_a_home_keeps_its_identity(tmp_path: Path) -> None:
    seen = set()
    for _ in range(2):
        with _daemon(tmp_path / "alice") as (process, ready):
            seen.add(ready["peer_id"])
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=END_S)
        assert process.returncode == 0
    assert len(seen) == 1


@pytest.mark.slow
def test_a_home_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    with _daemon(home) as (_, ready):
        assert len(ready["rpc"]) < 100
        status = _run("status", "--home", home, "--json")
        assert json.loads(status.stdout)["peer_id"] == ready["peer_id"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--memory", "lots"),
        ("--disk", "1XB"),
        ("--listen", "nowhere"),
        ("--bootstrap", "/ip4/127.0.0.1/tcp/1"),
        ("--hold", "layer0.router"),
        ("--threads", "0"),
        ("--device", "gpu"),
        ("--replicas", "1000"),
    ],
)
def test_a_wrong_option_of_start_is_exit_3_and_named(
    tmp_path: Path, option: str, value: str
) -> None:
    said = _run("start", "--home", tmp_path / "alice", option, value, "--json")
    assert said.returncode == 3
    assert option in said.stderr
    assert option in json.loads(said.stdout)["error"]["message"]
    assert not (tmp_path / "alice").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    if name in devices.present():
        pytest.skip(f"this machine has {name}")
    said = _run("start", "--home", tmp_path / "alice", "--device", name)
    assert said.returncode == 1 and said.stdout == ""
    error, why, then = said.stderr.splitlines()
    assert error == f"error: there is no device {name} on this machine"
    assert why.endswith(f"finds {', '.join(devices.present())}") and "auto" in then


def test_a_wrong_configuration_is_exit_3_and_names_its_key(tmp_path: Path) -> None:
    create_home(tmp_path / "alice", role="main", network=None)
    (tmp_path / "alice" / "config.toml").write_text('memory = "lots"\n')
    said = _run("start", "--home", tmp_path / "alice")
    assert said.returncode == 3
    assert "config.toml line 1, column 10" in said.stderr
    assert "why: memory: 'lots' is no size" in said.stderr


@pytest.mark.slow
def test_a_file_that_the_system_refuses_is_named_and_is_no_bug(tmp_path: Path) -> None:
    """As on a disk that is mounted for reading only, or where permissions are wrong."""
    create_home(tmp_path / "alice", role="main", network=None)
    (tmp_path / "alice" / "data" / "lock").mkdir()
    said = _run("start", "--home", tmp_path / "alice")
    assert said.returncode == 1
    assert said.stderr.startswith(f"error: cannot use {tmp_path / 'alice' / 'data' / 'lock'}")
    assert "Traceback" not in said.stderr and "bug" not in said.stderr


def test_init_says_what_it_made_and_never_makes_it_again(tmp_path: Path) -> None:
    made = _run("init", "--home", tmp_path / "alice", "--role", "gpu", "--json")
    assert made.returncode == 0
    document = json.loads(made.stdout)
    assert set(document) == {"home", "peer_id", "role", "network"}
    again = _run("init", "--home", tmp_path / "alice", "--json")
    assert again.returncode == 1
    assert json.loads(again.stdout)["error"]["data"]["path"] == str(tmp_path / "alice")


def test_a_genesis_file_that_is_none_is_exit_3(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    path.write_text("{}")
    said = _run("init", "--home", tmp_path / "alice", "--network", path)
    assert said.returncode == 3
    assert str(path) in said.stderr
    missing = _run("init", "--home", tmp_path / "alice", "--network", tmp_path / "none")
    assert missing.returncode == 1
    assert "No such file" in missing.stderr


def test_a_home_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = _run("init", "--home", tmp_path / "file" / "alice", "--json")
    assert said.returncode == 1
    assert os.fspath(tmp_path / "file") in said.stderr


def test_fsck_of_nothing_is_an_error(tmp_path: Path) -> None:
    said = _run("fsck", "--home", tmp_path / "none", "--json")
    assert said.returncode == 1
    assert json.loads(said.stdout)["error"]["data"]["path"] == str(tmp_path / "none")


def test_an_unknown_measurement_is_exit_3_and_the_known_ones_are_named() -> None:
    said = _run("bench", "nothing", "--json")
    assert said.returncode == 3
    assert "open-100000" in json.loads(said.stdout)["error"]["message"]


def test_the_program_itself_tells_wrong_usage_apart_from_no_node() -> None:
    line = [sys.executable, "-m", "blyan_node", "nothing"]
    assert subprocess.run(line, capture_output=True, check=False).returncode == 3


@pytest.mark.parametrize("command", [("--help",), ("init", "--json", "--home")])
def test_whoever_has_read_enough_of_the_output_sees_no_traceback(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    line = [*BLYAN, *command, *([str(tmp_path / "alice")] if "init" in command else [])]
    with open(writing, "wb") as closed:
        done = subprocess.run(
            line, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")
