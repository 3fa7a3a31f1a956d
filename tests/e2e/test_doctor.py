"""Five broken set-ups with real daemons: `doctor` names the cause of each."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blyan_node.testing.daemons import Node, blyan
from blyan_node.testing.foreground import Foreground
from blyan_node.testing.namespaces import Lan, lan, unavailable
from protocols.signing import Identity

STRANGER = Identity.from_seed(bytes(32)).peer_id
# What runs when Python starts with it in its path: the same machine with a wrong clock.
WRONG_CLOCK = """
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() - 600
time.time_ns = lambda: _time_ns() - 600 * 10**9
"""


@pytest.fixture
def alice(tmp_path: Path) -> Iterator[Node]:
    with Foreground(tmp_path / "alice") as node:
        yield node


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of the loopback on which nobody listens, and nobody can meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def diagnosis(home: Path, code: int, *options: object) -> dict[str, dict[str, Any]]:
    """The findings by name."""
    document = blyan("doctor", "--home", home, *options, code=code)
    assert document["ok"] is (code == 0)
    return {finding["name"]: finding for finding in document["findings"]}


def bad(findings: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, finding in findings.items() if finding["verdict"] == "bad"]


def test_two_healthy_nodes(alice: Node, tmp_path: Path) -> None:
    with Foreground(tmp_path / "bob", "--bootstrap", alice.addrs[0]) as bob:
        found = diagnosis(bob.home, 0)
        assert {"key", "network", "node", "bootstrap", "reachable", "clock", "disk", "pace"} <= {
            *found
        }
        for name in ("key", "network", "node", "bootstrap", "reachable", "clock"):
            assert found[name]["verdict"] == "ok", found
        assert "connected back to" in found["reachable"]["what"]


def test_a_wrong_key(tmp_path: Path) -> None:
    for name in ("ours", "other"):
        blyan(
            "network", "new", "--name", name, "--out", tmp_path / f"{name}.json",
            "--private", "--psk", tmp_path / f"{name}.key",
        )  # fmt: skip
    network = ("--network", tmp_path / "ours.json")
    with Foreground(tmp_path / "alice", *network, "--psk", tmp_path / "ours.key") as alice:
        options = ("--psk", tmp_path / "other.key", "--bootstrap", alice.addrs[0])
        with Foreground(tmp_path / "bob", *network, *options) as bob:
            found = diagnosis(bob.home, 1)
            assert bad(found) == ["bootstrap"]
            assert "does not share this private network's key" in found["bootstrap"]["why"]
            assert "same key file (--psk)" in found["bootstrap"]["next"]
    (tmp_path / "bob" / "identity.key").write_text("no key\n")
    found = diagnosis(tmp_path / "bob", 1)
    assert "key" in bad(found) and "64 hex digits" in found["key"]["why"]


def test_a_closed_port(alice: Node, tmp_path: Path, closed_port: int) -> None:
    told = f"/ip4/127.0.0.1/tcp/{closed_port}"
    bobs = Foreground(tmp_path / "bob", "--bootstrap", alice.addrs[0], "--announce", told)
    with bobs as bob:
        found = diagnosis(bob.home, 1)
        assert bad(found) == ["reachable"]
        assert told in found["reachable"]["why"] and "refused" in found["reachable"]["why"]
        assert f"open TCP port {closed_port} in the firewall" in found["reachable"]["next"]


def test_a_port_that_another_program_has(tmp_path: Path, closed_port: int) -> None:
    home = tmp_path / "bob"
    blyan("init", "--home", home)
    (home / "config.toml").write_text(f'listen = ["/ip4/127.0.0.1/tcp/{closed_port}"]\n')
    found = diagnosis(home, 1)
    assert bad(found) == ["listen"] and "in use" in found["listen"]["why"]
    assert found["node"]["verdict"] == "warn" and "does not run" in found["node"]["what"]


def test_a_wrong_clock(alice: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(WRONG_CLOCK)
    path = os.pathsep.join([str(tmp_path / "clock"), os.environ.get("PYTHONPATH", "")])
    bobs = tmp_path / "bob"
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        daemon = Foreground(bobs, "--bootstrap", alice.addrs[0])
    with daemon:
        found = diagnosis(bobs, 1)
        assert bad(found) == ["clock"]
        assert "its clock is 600 s behind" in found["clock"]["what"]
        assert "time server" in found["clock"]["next"]


def test_a_dead_bootstrap(tmp_path: Path, closed_port: int) -> None:
    dead = f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/{STRANGER}"
    with Foreground(tmp_path / "bob", "--bootstrap", dead) as bob:
        found = diagnosis(bob.home, 1)
        assert bad(found) == ["bootstrap"]
        assert dead in found["bootstrap"]["why"] and "refused" in found["bootstrap"]["why"]
        assert "give the address of another node" in found["bootstrap"]["next"]


def test_a_bootstrap_address_of_somebody_else(alice: Node, tmp_path: Path) -> None:
    wrong = alice.addrs[0].replace(alice.peer_id, STRANGER)
    with Foreground(tmp_path / "bob", "--bootstrap", wrong) as bob:
        found = diagnosis(bob.home, 1)
        assert "another peer id answers there" in found["bootstrap"]["why"]


def test_a_full_disk(tmp_path: Path) -> None:
    """The home is on a disk of 64 MiB, which a namespace can have."""
    if reason := unavailable():
        pytest.skip(reason)
    home = tmp_path / "bob"
    home.mkdir()
    start = [sys.executable, "-m", "cli.main", "start", "--home", str(home), "--json"]
    script = f'mount -t tmpfs -o size=64m tmpfs "{home}" && exec "$@"'
    with lan("10.81.7") as net:
        net.start(
            "bob", ["sh", "-c", script, "sh", *start], environment={**os.environ},
            log=tmp_path / "bob.log",
        )  # fmt: skip
        found = _until_it_runs(net, home, tmp_path / "bob.log")
    assert bad(found) == ["disk"]
    assert "the disk is full" in found["disk"]["what"] and str(home) in found["disk"]["what"]
    assert "free some space" in found["disk"]["next"]


def _until_it_runs(net: Lan, home: Path, log: Path) -> dict[str, dict[str, Any]]:
    """Asks the doctor on bob's machine once the daemon has said that it is ready."""
    bob = net.machines["bob"]
    with subprocess.Popen(
        ["tail", "-n", "+1", "-F", str(log)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as tail:
        assert tail.stdout is not None
        next(line for line in tail.stdout if b'"event": "ready"' in line)
        tail.terminate()
    line = [sys.executable, "-m", "cli.main", "doctor", "--home", str(home), "--json"]
    done = subprocess.run(bob.enter(*line), capture_output=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
