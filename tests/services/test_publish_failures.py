"""kill -9 at random moments of a publish, and disks that are full: real processes, real stores."""

import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from blyan_node.bench.models import write_model
from blyan_node.testing.checkpoints import make_checkpoint
from protocols import limits
from protocols.ids import chunk_hash
from protocols.tensors.manifest import Dtype
from storage.store import open_store

Ask = Callable[[Path, float | str | None], dict[str, Any]]
"""Publishes into a store, killed at a moment (seconds, or a step's name) or never; what was found.
"""
PROGRAM = Path(__file__).with_name("publishing_process.py")
KILLS = 50
KEPT = ("accepted", "bytes", "experts", "chunk_bytes")
SMALL: dict[str, object] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_local_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """About 40 MB in 48 experts."""
    return write_model(tmp_path_factory.mktemp("model") / "m", Dtype.BF16, **SMALL)


def call(*arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, check=True, timeout=120, env=environment(),
    )  # fmt: skip
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@contextmanager
def serving(model: Path) -> Iterator[Ask]:
    """A process that publishes `model` again and again."""
    server = subprocess.Popen(
        [sys.executable, str(PROGRAM), "serve", str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip

    def ask(data: Path, when: float | str | None) -> dict[str, Any]:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps([str(data), when]) + "\n")
        server.stdin.flush()
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        return answer

    assert server.stdin is not None
    with server, server.stdin:
        yield ask


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_killed_at_fifty_moments(model: Path, tmp_path: Path) -> None:
    """The store opens, is clean, keeps what it had, and a publish that goes on reuses it."""
    with serving(model) as ask_at:

        def ask(name: str, after_s: float | None) -> dict[str, Any]:
            return ask_at(tmp_path / name, after_s)

        whole = ask("whole", None)
        assert whole["bad"] == [] and whole["reused_bytes"] == 0
        seed = random.SystemRandom().getrandbits(32)
        rng = random.Random(seed)
        print(f"seed {seed}; a whole publish takes {whole['seconds']:.2f} s")
        reused, killed, before = 0, 0, None
        for kill in range(KILLS):
            after_s = rng.uniform(0, whole["seconds"])
            found = ask("killed", after_s)
            print(f"{kill}: after {after_s:.3f} s {found}")
            assert found["bad"] == []
            killed += found["killed"]
            if before is not None:  # nothing that was there is gone
                assert found["chunk_bytes"] >= before["chunk_bytes"]
                assert found["accepted"] >= before["accepted"]
            before = found
            if found["accepted"] or kill % 10 == 9:
                done = ask("killed", None)
                assert done["bad"] == [] and done["accepted"] == whole["accepted"]
                assert done["staged"] == 0 and done["bytes"] == whole["bytes"]
                assert found["accepted"] == 0 or done["blocks"] == 0
                reused += done["reused_bytes"]
                shutil.rmtree(tmp_path / "killed")
                before = None
        assert killed > KILLS / 4 and reused > 0


# In the order of a publish, and what is there if it ends at the step.
STEPS = {
    "hash": "blocks", "write": "blocks", "enter": "blocks", "after enter": "blocks",
    "stage": "blocks", "sign": "blocks", "release": "blocks", "after release": "blocks",
    "pin": "blocks", "submit": "blocks", "commit": "blocks", "after commit": "model",
    "tidy": "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ask, dict[str, Any]]]:
    """A process that publishes a tiny model, and what it found when nothing happened."""
    folder = tmp_path_factory.mktemp("tiny")
    with serving(make_checkpoint("mixtral", folder / "model", sharded=True)) as ask:
        yield ask, ask(folder / "whole", None)


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_each_step(
    tiny_server: tuple[Ask, dict[str, Any]], tmp_path: Path, step: str
) -> None:
    """The store is clean, a model is there whole or not at all, and the next publish reuses it."""
    ask, whole = tiny_server
    found = ask(tmp_path / "data", step)
    assert found["killed"] and found["bad"] == []
    assert found["accepted"] == (whole["accepted"] if STEPS[step] == "model" else 0)
    done = ask(tmp_path / "data", None)
    assert done["bad"] == [] and done["staged"] == 0
    assert [done[k] for k in KEPT] == [whole[k] for k in KEPT]
    assert 0 < done["reused_bytes"] <= done["bytes"]
    if STEPS[step] == "model":
        assert (done["blocks"], done["reused_bytes"]) == (0, done["bytes"])


@pytest.mark.slow
def test_a_file_system_that_takes_no_more(model: Path, tmp_path: Path) -> None:
    """A bound on file sizes is what LevelDB sees of a full disk: an error in the middle."""
    data = tmp_path / "data"
    with open_store(data) as store:
        kept = [(chunk_hash(d), d) for d in (b"acknowledged", bytes(9))]
        store.put_chunks(kept)
    limit = 6 * limits.MIB
    full = call("publish", model, data, limit)
    assert full["refused"] == "DISK_FULL" and "Free some space" in full["message"]
    found = call("look", data)
    assert found["bad"] == [] and found["accepted"] == 0
    with open_store(data) as store:
        assert all(store.get_chunk(name) == d for name, d in kept)
    done = call("publish", model, data)
    assert done["reused_bytes"] > 0 and call("look", data)["bad"] == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 24 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(command, stderr=subprocess.PIPE, check=False)
    if not mounted or mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk(model: Path, small_disk: Path) -> None:
    """With the reserve, the store refuses while LevelDB still has room to sort what it took."""
    refused = call("publish", model, small_disk / "data")
    assert refused["refused"] == "DISK_FULL" and "reserve" in refused["message"]
    assert call("look", small_disk / "data")["bad"] == []


def test_a_disk_that_is_full_to_the_last_byte(model: Path, small_disk: Path, monkeypatch) -> None:
    """Without the reserve LevelDB hits the end itself."""
    from storage.errors import DiskFull
    from storage.fsck import check

    monkeypatch.setattr(limits, "disk_reserve_bytes", 0)
    rng = random.Random(4)
    kept: list[tuple[Any, bytes]] = []
    with open_store(small_disk / "data") as store:
        store.chunks._free_bytes = lambda: 1 << 40
        with pytest.raises(DiskFull):
            for _ in range(200):
                data = rng.randbytes(limits.chunk_bytes)
                store.put_chunks([(chunk_hash(data), data)])
                kept.append((chunk_hash(data), data))
        assert len(kept) > 20
        assert all(store.get_chunk(name) == data for name, data in kept)
        with pytest.raises(DiskFull, match="restart the node"):
            store.put_chunks([(chunk_hash(b"x"), b"x")])
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    with open_store(small_disk / "data") as store:
        assert all(store.get_chunk(name) == data for name, data in kept)
        assert check(store).bad == []
        store.put_chunks([(chunk_hash(b"x"), b"x")])


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    piece = os.urandom(limits.chunk_bytes - 8)
    with open_store(tmp_path) as store:
        peaks = []
        for count in (80, 320):
            pieces = (n.to_bytes(8, "big") + piece for n in range(count * 1000, count * 1001))
            tracemalloc.start()
            with store.ingest() as ingest:
                ingest.write_tensor("t", Dtype.U8, (count * limits.chunk_bytes,), pieces)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert ingest.new_bytes == count * limits.chunk_bytes
    most = (limits.ingest_batches_waiting_max + 3) * limits.ingest_batch_bytes
    assert max(peaks) < most
