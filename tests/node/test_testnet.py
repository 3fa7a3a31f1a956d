"""Testnets: roles, names, processes that are told apart, and real daemons that come and go."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blyan_node.testing.daemons import alive, blyan
from blyan_node.testnet import process, state
from blyan_node.testnet.process import Process, start_time
from blyan_node.testnet.verbs import parse_roles
from protocols.errors import Refused, RemoteProtocolError


def _sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_one_main_and_the_rest_gpu() -> None:
    assert parse_roles(4, None) == ["main", "gpu", "gpu", "gpu"]
    assert parse_roles(None, "main,gpu") == ["main", "gpu"]


def test_main_nodes_come_first_so_that_alice_is_one() -> None:
    assert parse_roles(3, "gpu,main,gpu") == ["main", "gpu", "gpu"]


@pytest.mark.parametrize(
    ("nodes", "roles"),
    [(0, None), (state.NODES_MAX + 1, None), (2, "main"), (2, "main,boss"), (None, None)],
)
def test_wrong_numbers_and_roles_are_named(nodes: int | None, roles: str | None) -> None:
    with pytest.raises(RemoteProtocolError, match="--"):
        parse_roles(nodes, roles)


def test_a_process_is_known_by_its_start_and_not_by_its_number() -> None:
    with _sleeper() as child:
        started = start_time(child.pid)
        assert started is not None
        real, stranger = Process(child.pid, started), Process(child.pid, "another time")
        assert real.alive and not stranger.alive
        stranger.signal(signal.SIGKILL)
        assert real.alive
        real.signal(signal.SIGKILL)
        child.wait()
        assert not real.alive
    assert start_time(child.pid) is None


def test_a_process_that_has_ended_and_is_not_reaped_is_not_alive() -> None:
    with _sleeper() as child:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert start_time(child.pid) is None


def test_ending_is_gentle_first_and_certain_then() -> None:
    stubborn = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", stubborn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        started = start_time(child.pid)
        assert started is not None
        process.end([Process(child.pid, started)], patience_s=0.2)
        assert child.wait() == -signal.SIGKILL


def test_there_is_no_testnet_here(tmp_path: Path) -> None:
    for verb in (["status"], ["down"], ["kill", "alice"], ["restart", "alice"]):
        document = blyan("testnet", *verb, "--dir", tmp_path, code=1)
        assert document["error"]["data"]["path"] == str(tmp_path)


def test_a_damaged_state_is_an_error(tmp_path: Path) -> None:
    (tmp_path / state.FILE).write_text("{")
    with pytest.raises(Refused, match=r"testnet\.json"):
        state.load(tmp_path)


@pytest.mark.slow
def test_daemons_come_go_and_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    pids: set[int] = set()
    try:
        made = blyan("testnet", "up", "--nodes", 3, "--dir", folder)
        assert made["dir"] == str(folder)
        assert json.loads(Path(made["network"]).read_text())["name"] == "testnet"
        assert [(n["name"], n["role"], n["state"]) for n in made["nodes"]] == [
            ("alice", "main", "up"),
            ("bob", "gpu", "up"),
            ("carol", "gpu", "up"),
        ]
        pids |= {node["pid"] for node in made["nodes"]}
        for node in made["nodes"]:
            peers = blyan("--rpc", node["rpc"], "peers")["peers"]
            assert {peer["peer_id"] for peer in peers} == {
                other["peer_id"] for other in made["nodes"] if other is not node
            }
        blyan("testnet", "up", "--nodes", 3, "--dir", folder, code=1)

        killed = blyan("testnet", "kill", "bob", "--dir", folder)["nodes"][1]
        assert (killed["state"], killed["pid"]) == ("down", None)
        blyan("testnet", "kill", "bob", "--dir", folder, code=1)
        blyan("testnet", "kill", "nobody", "--dir", folder, code=1)

        back = blyan("testnet", "restart", "bob", "--dir", folder)["nodes"][1]
        assert back["state"] == "up"
        assert (back["addrs"], back["peer_id"]) == (killed["addrs"], killed["peer_id"])
        pids.add(back["pid"])
        assert blyan("testnet", "status", "--dir", folder)["nodes"][1] == back
    finally:
        ended = blyan("testnet", "down", "--dir", folder)
    assert {node["state"] for node in ended["nodes"]} == {"down"}
    assert not [pid for pid in pids if alive(pid)]
    again = blyan("testnet", "up", "--nodes", 3, "--dir", folder)
    assert [n["addrs"] for n in again["nodes"]] == [n["addrs"] for n in made["nodes"]]
    blyan("testnet", "down", "--dir", folder)


@pytest.mark.slow
def test_ctrl_c_is_held_back_until_a_daemon_is_noted() -> None:
    noted: list[str] = []
    with pytest.raises(KeyboardInterrupt), process.interrupt_later():
        os.kill(os.getpid(), signal.SIGINT)
        noted.append("daemon")
    assert noted == ["daemon"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_up_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    line = [sys.executable, "-m", "cli.main", "testnet", "up", "--nodes", "2", "--dir", str(folder)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as up:
        while not (folder / "alice.log").exists():
            assert up.poll() is None
        up.send_signal(signal.SIGINT)
        _, errors = up.communicate(timeout=60)
    assert up.returncode == 130
    assert b"Traceback" not in errors
    nodes = blyan("testnet", "status", "--dir", folder)["nodes"]
    assert {node["state"] for node in nodes} == {"down"}
