"""A whole daemon that is killed in the middle of a publish, or has no room: nothing is lost.

`tests/services/test_publish_failures.py` kills the publishing service alone, at each of its steps
and at fifty moments.
"""

import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blyan_node.bench.models import write_model
from blyan_node.testing.daemons import Node
from blyan_node.testing.foreground import Foreground
from protocols import limits
from protocols.errors import ErrorCode
from protocols.tensors.manifest import Dtype

KILLS = 3
TRIES_S_MAX = 30
SEED = random.SystemRandom().getrandbits(32)
ASK = ("--prompt-ids", "3,17,42", "--max-tokens", 4, "--temperature", 0, "--ignore-eos")
SMALL: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
LARGE = SMALL | {"hidden_size": 512, "intermediate_size": 2048, "num_local_experts": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small`, which is published before, and `large` of 200 MB."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "small", Dtype.F32, **SMALL)
    write_model(folder / "large", Dtype.BF16, **LARGE)
    return folder


def _publish(node: Node, models: Path, name: str, **options: Any) -> dict[str, Any]:
    done: dict[str, Any] = node("model", "publish", models / name, "--name", name, **options)
    return done


def _tokens(node: Node) -> list[int]:
    ids: list[int] = node("generate", "--model", "small", *ASK)["token_ids"]
    return ids


def _names(node: Node) -> set[str]:
    return {model["name"] for model in node("model", "list")["models"]}


def test_a_daemon_killed_in_its_publishes(models: Path, tmp_path: Path) -> None:
    """Every start finds the store whole; the last publish reuses what the killed ones stored.

    A publish that came as far as its release is there, whole; the next one takes another name.
    """
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    with Foreground(tmp_path / "alice") as alice:
        _publish(alice, models, "small")
        expected = _tokens(alice)
    stored, published = 0, {"small"}
    for number in range(KILLS):
        daemon = Foreground(tmp_path / "alice")
        with daemon as alice:
            assert alice("status")["stored_bytes"] >= stored
            stored = alice("status")["stored_bytes"]
            assert _names(alice) >= published
            published = _names(alice)
            share, name = rng.random(), f"large{len(published)}"
            with alice.stream("model.publish", {"path": f"{models}/large", "name": name}) as lines:
                next(n for n in lines if n["params"]["done"] >= share * n["params"]["total"])
                daemon.process.kill()
                daemon.process.wait()
        report = daemon.fsck()
        print(f"{number}: {name} killed after {share:.0%}, {report['chunks']} chunks")
        assert report["ok"], report["bad"][:3]
    with Foreground(tmp_path / "alice") as alice:
        assert _names(alice) >= published
        last = f"large{len(_names(alice))}"
        done = alice("model", "publish", models / "large", "--name", last)
        assert done["reused_bytes"] > 0
        for name in _names(alice):
            assert alice("model", "verify", name)["ok"]
        assert _tokens(alice) == expected


def _refused(node: Node, models: Path, name: str) -> dict[str, Any]:
    error: dict[str, Any] = _publish(node, models, name, code=1)["error"]
    assert error["code"] == ErrorCode.DISK_FULL, error
    return error


def test_no_more_than_the_disk_option_allows(models: Path, tmp_path: Path) -> None:
    daemon = Foreground(tmp_path / "alice", "--disk", "40MiB")
    with daemon as alice:
        _publish(alice, models, "small")
        expected = _tokens(alice)
        stored = alice("status")["stored_bytes"]
        error = _refused(alice, models, "large")
        assert "--disk allows" in error["message"] and "--disk" in error["data"]["next"]
        assert error["data"]["new_bytes"] > error["data"]["room_bytes"]
        assert alice("status")["stored_bytes"] == stored
        dry = alice("model", "publish", models / "large", "--name", "large", "--dry-run", code=1)
        assert dry["error"] == error
        assert alice("status")["stored_bytes"] <= 40 * limits.MIB
        assert _names(alice) == {"small"}
        assert _tokens(alice) == expected
        assert alice("model", "verify", "small")["ok"]
        alice("stop")
        daemon.ends()
    assert daemon.fsck()["ok"]
    with Foreground(tmp_path / "alice", "--disk", "1GiB") as alice:
        assert _tokens(alice) == expected
        there = {path.name for path in (tmp_path / "alice").iterdir()}
        dry = alice("model", "publish", models / "large", "--name", "large", "--dry-run")
        assert dry["seconds"] > 0 and dry["model"] is None
        assert {path.name for path in (tmp_path / "alice").iterdir()} == there
        assert alice("status")["stored_bytes"] == stored
        done = _publish(alice, models, "large")
        assert done["reused_bytes"] == 0, "the refused one stored nothing"
        for key in ("blocks", "experts", "bytes", "reused_bytes"):
            assert dry[key] == done[key]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 280 MiB, of which the store leaves `disk_reserve_bytes` alone."""
    disk = tmp_path / "bob"
    disk.mkdir()
    size = f"mode=700,size={limits.disk_reserve_bytes + 88 * limits.MIB}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(command, stderr=subprocess.PIPE, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def _tried(node: Node, home: Path) -> bool:
    log = (home.parent / f"{home.name}.log").read_text()
    return "large" in _names(node) or "nothing more was stored" in log


def _fill(disk: Path) -> Path:
    """A file that takes every byte that is left."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(limits.MIB)) == limits.MIB:
                pass
        except OSError as error:
            print(f"full: {error}")
    return filler


def test_a_disk_without_room(models: Path, tmp_path: Path, small_disk: Path) -> None:
    """Bob's disk fills to the last byte while alice goes on: he lives, and catches up later."""
    home = small_disk
    daemon = Foreground(tmp_path / "alice", "--role", "main")
    with daemon as alice:
        with Foreground(home, "--role", "main", "--bootstrap", alice.addrs[0]) as bob:
            _publish(bob, models, "small")
            expected = _tokens(bob)
            error = _refused(bob, models, "large")
            assert "reserve" in error["message"]
            filler = _fill(small_disk)
            _publish(alice, models, "large")
            deadline = time.monotonic() + TRIES_S_MAX
            while not _tried(bob, home):
                assert time.monotonic() < deadline, (home.parent / "bob.log").read_text()[-3000:]
            error = bob("model", "fetch", "large", code=1)["error"]
            assert error["code"] in (ErrorCode.DISK_FULL, ErrorCode.NOT_FOUND)
            assert _tokens(bob) == expected
            assert bob("model", "verify", "small")["ok"]
            assert {p["peer_id"] for p in bob("peers")["peers"]} == {alice.peer_id}
            bob("stop")
        filler.unlink()
        again = Foreground(home, "--bootstrap", alice.addrs[0])
        with again as bob:
            bob.until("the release", lambda: _names(bob) == {"small", "large"})
            assert _tokens(bob) == expected
            bob("stop")
            again.ends()
        assert again.fsck()["ok"]
