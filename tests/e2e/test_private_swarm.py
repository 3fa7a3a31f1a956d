"""A private swarm of real daemons: friends join it, outsiders hear why not and wear nobody out."""

import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blyan_node.network.private import (
    DIALLED,
    GREETING,
    NONCE_BYTES,
    WITHOUT_KEY,
    WRONG_KEY,
    xsalsa20,
)
from blyan_node.testing.daemons import Node, blyan
from blyan_node.testing.foreground import Foreground
from protocols.limits import KIB, MIB

ATTEMPTS, AT_ONCE = 10_000, 16
KEPT_BYTES_MAX = 32 * MIB
LINES_MAX = 20
WARMING_UP = 300
SAID_S_MAX = 60
POLL_S = 0.2


@pytest.fixture
def swarm(tmp_path: Path) -> Path:
    """A folder with the genesis of a private network, its key, and another network's key."""
    made = blyan(
        "network", "new", "--name", "ours", "--out", tmp_path / "ours.json",
        "--private", "--psk", tmp_path / "ours.key",
    )  # fmt: skip
    assert made["parameters"] == {"private": 1}
    assert (tmp_path / "ours.key").stat().st_mode & 0o777 == 0o600
    blyan(
        "network", "new", "--name", "other", "--out", tmp_path / "other.json",
        "--private", "--psk", tmp_path / "other.key",
    )  # fmt: skip
    return tmp_path


def start(swarm: Path, name: str, key: str, *options: object) -> Foreground:
    words = ("--network", swarm / "ours.json", "--psk", swarm / key, "--hold", "none", *options)
    return Foreground(swarm / name, *words)


def lines(daemon: Foreground) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.log.read_text().splitlines()]


def said(daemon: Foreground, part: str) -> list[str]:
    return [line["message"] for line in lines(daemon) if part in line.get("message", "")]


def until_said(daemon: Foreground, part: str) -> None:
    """Looks again and again: a log tells nobody that it has grown."""
    deadline = time.monotonic() + SAID_S_MAX
    while not said(daemon, part):
        assert daemon.process.poll() is None, daemon.log.read_text()[-3000:]
        assert time.monotonic() < deadline, daemon.log.read_text()[-3000:]
        time.sleep(POLL_S)


def test_friends_join_and_outsiders_are_refused_in_one_line_each(swarm: Path) -> None:
    alices = start(swarm, "alice", "ours.key")
    with alices as alice:
        bobs = start(swarm, "bob", "ours.key", "--bootstrap", alice.addrs[0], "-v")
        mallorys = start(swarm, "mallory", "other.key", "--bootstrap", alice.addrs[0])
        with bobs as bob, mallorys as mallory:
            until_said(bobs, f"peer {alice.peer_id} up")
            until_said(mallorys, DIALLED[True])
            assert [peer["peer_id"] for peer in bob("peers")["peers"]] == [alice.peer_id]
            assert mallory("peers")["peers"] == []
            assert (swarm / "bob" / "swarm.key").read_text() == (swarm / "ours.key").read_text()
        assert len(said(alices, WRONG_KEY)) == 1
        assert len(said(mallorys, f"bootstrap node {alice.peer_id} is not reached")) == 1


def test_a_node_without_the_key_of_its_network_does_not_start(swarm: Path) -> None:
    home = swarm / "carol"
    blyan("init", "--home", home, "--network", swarm / "ours.json")
    refused = blyan("start", "--home", home, code=1)
    assert "is private" in json.dumps(refused) and "--psk FILE" in json.dumps(refused)
    (swarm / "ours.key").chmod(0o644)
    refused = blyan("start", "--home", home, "--psk", swarm / "ours.key", code=1)
    assert "chmod 600" in json.dumps(refused)


def test_ten_thousand_outsiders_wear_nobody_out(swarm: Path) -> None:
    """By count: what is kept, what is said, and that the swarm goes on."""
    alices = start(swarm, "alice", "ours.key")
    with alices as alice:
        bobs = start(swarm, "bob", "ours.key", "--bootstrap", alice.addrs[0], "-v")
        with bobs as bob:
            until_said(bobs, f"peer {alice.peer_id} up")
            attack(alice, WARMING_UP)
            before, lines_before = resident_bytes(alice), len(lines(alices))
            attack(alice, ATTEMPTS)
            assert resident_bytes(alice) - before < KEPT_BYTES_MAX
            assert len(lines(alices)) - lines_before < LINES_MAX
            for why in (WITHOUT_KEY, WRONG_KEY):
                assert said(alices, why)
            assert open_sockets(alice) < 40
            assert alice("status")["peers"] == 1
            assert [peer["peer_id"] for peer in bob("peers")["peers"]] == [alice.peer_id]
            assert not said(bobs, f"peer {alice.peer_id} down")


def attack(victim: Node, attempts: int) -> None:
    """Outsiders with a wrong key, none and noise; each waits until it is shown the door."""
    port = int(victim.addrs[0].split("/")[4])
    kinds: list[Callable[[], bytes]] = [wrong_key, lambda: GREETING, lambda: os.urandom(64)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outcomes = pool.map(lambda n: shown_the_door(port, kinds[n % 3]()), range(attempts))
        assert sum(outcomes) == attempts


def wrong_key() -> bytes:
    nonce = bytes(NONCE_BYTES)
    return nonce + xsalsa20(bytes(32), nonce).encrypt(GREETING)


def shown_the_door(port: int, first: bytes) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as link:
        link.sendall(first)
        try:
            while link.recv(KIB):
                pass
        except ConnectionResetError:
            pass  # with bytes of ours unread
    return True


def resident_bytes(node: Node) -> int:
    return int(Path(f"/proc/{node.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_sockets(node: Node) -> int:
    return len(list(Path(f"/proc/{node.pid}/fd").iterdir()))
