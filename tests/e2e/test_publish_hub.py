"""`model publish hf:…` by the command, against a real daemon and a hub on loopback."""

import os
import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import alive
from blyan_node.testing.foreground import Foreground, command
from blyan_node.testing.hub_server import Fault, HubServer, Repository, files_of
from protocols.errors import ErrorCode

NAME = "hf:acme/tiny"
SHARD = "model-00005-of-00014.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("tiny") / "a", sharded=True)


@pytest.fixture
def server(tiny: Path) -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.repositories["acme/tiny"] = Repository()
        hub.repositories["acme/tiny"].commit(files_of(tiny), "main", "v1")
        yield hub


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def children(pid: int) -> set[int]:
    """The processes that a process has started and not ended."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found |= {int(word) for word in (task / "children").read_text().split()}
    return {child for child in found if alive(child)}


def test_dry_run_interrupted_resumed_and_the_same_as_the_directory(
    server: HubServer, tiny: Path, tmp_path: Path
) -> None:
    home = tmp_path / "alice"
    with Foreground(home, "--hub-endpoint", server.url) as alice:
        dry = alice("model", "publish", NAME, "--name", "tiny", "--dry-run")
        commit = server.repositories["acme/tiny"].revisions["main"]
        assert dry["source"] == f"{NAME}@{commit}"
        assert dry["download_bytes"] == 0 and dry["new_bytes"] > dry["bytes"], "all fits an outline"
        assert alice("status")["stored_bytes"] == 0
        missing = alice("model", "publish", f"{NAME}@v9", "--name", "tiny", code=1)["error"]
        assert missing["code"] == ErrorCode.NOT_FOUND and f"{NAME}@v9" in missing["data"]["source"]

        server.faults[SHARD] = Fault(cut=30_000, hang=True)
        with command(alice, "model", "publish", NAME, "--name", "tiny") as publishing:
            server.hanging.wait()
            (child,) = children(alice.pid or 0)
            assert publishing.interrupted() == 130
        assert not alive(child) and children(alice.pid or 0) == set()
        assert alice("status")["stored_bytes"] == 0

        server.faults.clear()
        done = alice("model", "publish", f"{NAME}@v1", "--name", "tiny")
        assert done["source"] == f"{NAME}@{commit}"
        for key in ("bytes", "experts", "blocks", "reused_bytes"):
            assert done[key] == dry[key]
        assert not (home / "downloads" / "acme--tiny").exists()
        again = alice("model", "publish", tiny, "--name", "tiny")
        assert (again["blocks"], again["root"], again["source"]) == (0, done["root"], None)
        alice("stop")


def test_a_daemon_that_is_killed_leaves_no_process(server: HubServer, tmp_path: Path) -> None:
    server.faults[SHARD] = Fault(cut=30_000, hang=True)
    daemon = Foreground(tmp_path / "alice", "--hub-endpoint", server.url)
    with daemon as alice, command(alice, "model", "publish", NAME, "--name", "tiny"):
        server.hanging.wait()
        (child,) = children(alice.pid or 0)
        watched = os.pidfd_open(child)
        daemon.process.kill()
        daemon.process.wait()
        assert select.select([watched], [], [], 30)[0], "the hub process lives on"
        os.close(watched)


def test_a_daemon_that_is_stopped_in_the_middle(server: HubServer, tmp_path: Path) -> None:
    server.faults[SHARD] = Fault(cut=30_000, hang=True)
    daemon = Foreground(tmp_path / "alice", "--hub-endpoint", server.url)
    with daemon as alice, command(alice, "model", "publish", NAME, "--name", "tiny"):
        server.hanging.wait()
        (child,) = children(alice.pid or 0)
        alice("stop")
        daemon.ends()
        assert not alive(child)
