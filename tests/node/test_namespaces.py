"""Machines that are namespaces: they reach each other by name, and nothing is left of them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blyan_node.testing.daemons import alive
from blyan_node.testing.namespaces import Machine, Mount, NamespaceFailed, lan, unavailable

GONE_S_MAX = 20
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 7000), 2).recv(1)"
LISTEN = """
import socket
server = socket.create_server(("0.0.0.0", 7000))
while True:
    server.accept()[0].send(b"x")
"""
LEFT_ALONE = """
import sys, time
from blyan_node.testing.namespaces import lan
with lan("10.81.2") as net:
    alice = net.start("alice", ["sleep", "600"])
    print(alice.process.pid, net.switch.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def allowed() -> None:
    if reason := unavailable():
        pytest.skip(reason)


def _reaches(machine: Machine, name: str) -> bool:
    line = machine.enter(sys.executable, "-c", CONNECT, name)
    return subprocess.run(line, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_machines_reach_each_other_by_name_until_the_cable_is_out() -> None:
    with lan("10.81.2") as net:
        alice = net.start("alice", ["sleep", "600"])
        bob = net.start("bob", [sys.executable, "-c", LISTEN])
        assert alice.run("hostname").strip() == "alice"
        deadline = time.monotonic() + GONE_S_MAX
        while not _reaches(alice, "bob"):  # it takes a moment to listen
            assert bob.process.poll() is None and time.monotonic() < deadline
        net.unplug("bob")
        assert not _reaches(alice, "bob")
        net.plug("bob")
        while not _reaches(alice, "bob"):
            assert time.monotonic() < deadline
        address = bob.address
        bob.kill()
        assert not _reaches(alice, "bob")
        assert net.start("bob", ["sleep", "600"]).address == address


def test_a_machine_sees_what_is_mounted_and_writes_there_alone(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
    mounts = {
        "/srv/mine": Mount(tmp_path / "mine"),
        "/srv/theirs": Mount(tmp_path / "theirs", True),
    }
    with lan("10.81.2") as net:
        alice = net.start("alice", ["sleep", "600"], mounts=mounts, read_only=True)
        alice.run("touch", "/srv/mine/file")
        assert (tmp_path / "mine" / "file").exists()
        for path in ("/srv/theirs/file", "/file", "/etc/file"):
            with pytest.raises(NamespaceFailed, match="Read-only file system"):
                alice.run("touch", path)


def test_nothing_is_left_when_a_test_fails() -> None:
    with pytest.raises(RuntimeError, match="in the middle"), lan("10.81.2") as net:
        machines = [net.switch, net.start("alice", ["sleep", "600"])]
        raise RuntimeError("in the middle")
    assert not [machine for machine in machines if alive(machine.process.pid)]


def test_nothing_is_left_when_the_test_is_killed() -> None:
    line = [sys.executable, "-c", LEFT_ALONE]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout is not None
        pids = [int(word) for word in test.stdout.readline().split()]
        assert len(pids) == 2
        test.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + GONE_S_MAX
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
