"""What a dry run says is what the publish that follows does."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import trio
from safetensors.torch import load_file, save_file

from blyan_node.services import watched
from blyan_node.services.estimate import estimate
from blyan_node.services.publish import Published, Rehearsal
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.publishing import publishing, rows
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from storage.errors import DiskFull
from storage.fsck import check
from storage.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "home" / "data") as store:
        yield store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("tiny") / "a", sharded=True)


def with_another_expert(tiny: Path, out: Path, name: str = "layers.1.") -> Path:
    shutil.copytree(tiny, out)
    for file in out.glob("*.safetensors"):
        found = load_file(file)
        for tensor in [n for n in found if name in n and "experts.2." in n]:
            found[tensor] = found[tensor] * 0.5
        save_file(found, file, {"format": "pt"})
    return out


async def both(store: Store, path: Path, name: str = "tiny") -> tuple[Rehearsal, Published]:
    """A dry run that changes nothing, the publish, and each number of both."""
    publish, before = publishing(store), rows(store)
    said = await publish.rehearse(path, name)
    assert rows(store) == before
    stored = store.stats()
    done = await publish.publish(path, name)
    assert (said.name, said.blocks, said.experts) == (done.name, done.blocks, done.experts)
    assert (said.bytes, said.reused_bytes) == (done.bytes, done.reused_bytes)
    assert store.stats().chunk_bytes - stored.chunk_bytes == said.new_bytes
    assert said.model in (None, done.model)
    assert check(store).ok
    return said, done


@trio_test
async def test_a_new_model(store, tiny) -> None:
    said, done = await both(store, tiny)
    assert said.model is None
    assert said.blocks == len(store.heads(done.model)) + 2
    assert said.reused_bytes == 0
    assert said.bytes < said.new_bytes < said.room_bytes, "the release is among what is new"


@trio_test
async def test_a_model_that_is_there(store, tiny) -> None:
    await publishing(store).publish(tiny, "tiny")
    said, done = await both(store, tiny)
    assert said.model == done.model
    assert (said.blocks, said.new_bytes, said.reused_bytes) == (0, 0, done.bytes)


@trio_test
async def test_a_version_with_one_other_expert(store, tiny, tmp_path) -> None:
    await publishing(store).publish(tiny, "tiny")
    said, done = await both(store, with_another_expert(tiny, tmp_path / "b"))
    assert said.model == done.model
    assert said.blocks == 2 and 0 < said.bytes - said.reused_bytes < said.new_bytes


@trio_test
async def test_the_same_bytes_under_another_name(store, tiny) -> None:
    """All is stored, and yet there are blocks to write."""
    await publishing(store).publish(tiny, "tiny")
    said, done = await both(store, tiny, "other")
    assert said.model is None and said.reused_bytes == said.bytes
    assert said.blocks == len(store.heads(done.model)) + 2


@trio_test
async def test_a_model_whose_tensors_are_alike(store, tmp_path) -> None:
    """A chunk that occurs twice in one model is stored once."""
    path = make_checkpoint("mixtral", tmp_path / "a")
    file = path / "model.safetensors"
    found = load_file(file)
    alike = [name for name in found if name.endswith("w1.weight")]
    save_file(found | {name: found[alike[0]].clone() for name in alike}, file, {"format": "pt"})
    said, _ = await both(store, path)
    assert said.reused_bytes == (len(alike) - 1) * found[alike[0]].nbytes


class Dies:
    async def submit(self, *args: Any) -> None:
        raise trio.BrokenResourceError


@trio_test
async def test_a_publish_that_died_before_its_end(store, tiny) -> None:
    publish = publishing(store)
    publish._chain = Dies()
    with pytest.raises(trio.BrokenResourceError):
        await publish.publish(tiny, "tiny")
    said, done = await both(store, tiny)
    assert said.model == done.model and said.new_bytes == 0
    assert said.blocks == len(store.heads(done.model)) + 2


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
@trio_test
async def test_a_publish_that_was_cancelled_in_the_middle(store, tiny, monkeypatch, share) -> None:
    monkeypatch.setattr(watched, "PROGRESS_BYTES", 1_000)
    with trio.CancelScope() as scope:

        def stop(done: int, total: int | None, what: str) -> None:
            if done > share * (total or 0):
                scope.cancel()

        await publishing(store).publish(tiny, "tiny", stop)
    assert scope.cancelled_caught
    said, _ = await both(store, tiny)
    assert 0 < said.reused_bytes < said.bytes


@trio_test
async def test_an_interrupted_publish_of_another_configuration(store, tiny, tmp_path) -> None:
    """What it left is of no use but for its chunks, and is forgotten."""
    publish = publishing(store)
    publish._chain = Dies()
    with pytest.raises(trio.BrokenResourceError):
        await publish.publish(tiny, "tiny")
    shutil.copytree(tiny, tmp_path / "b")
    (tmp_path / "b" / "LICENSE").write_text("do as you like")
    said, _ = await both(store, tmp_path / "b")
    assert said.model is None and said.bytes - said.reused_bytes == len("do as you like")
    assert store.stats().staged == 0


@trio_test
async def test_a_dry_run_uses_up_no_number_of_the_author(store, tiny) -> None:
    publish = publishing(store)
    await publish.rehearse(tiny, "tiny")
    done = await publish.publish(tiny, "tiny")
    assert store.block(done.model).header.seq == 1


@trio_test
async def test_a_dry_run_is_cancelled(store, tiny, monkeypatch) -> None:
    monkeypatch.setattr(watched, "PROGRESS_BYTES", 1_000)
    before = rows(store)
    with trio.CancelScope() as scope:
        await publishing(store).rehearse(tiny, "tiny", lambda *_: scope.cancel())
    assert scope.cancelled_caught and rows(store) == before


@trio_test
async def test_the_estimate_is_the_slower_of_reading_and_writing(tmp_path, monkeypatch) -> None:
    found = Rehearsal(None, "n", 3, 1, 6_000, 2_000, 4_000, 10**9, seconds=2.0)
    rates = iter((1_000.0, 4_000.0))
    asked: list[tuple[Path, int]] = []

    def rate(directory: Path, size: int) -> float:
        asked.append((directory, size))
        return next(rates)

    monkeypatch.setattr("blyan_node.services.estimate.write_rate", rate)
    slow, fast = [await estimate(found, tmp_path) for _ in range(2)]
    assert (slow.seconds, slow.read_bytes_per_s, slow.write_bytes_per_s) == (4.0, 3_000, 1_000)
    assert (fast.seconds, fast.write_bytes_per_s) == (2.0, 4_000)
    assert asked == [(tmp_path, 4_000)] * 2
    large = Rehearsal(None, "n", 3, 1, limits.GIB, 0, limits.GIB, 10**12, seconds=2.0)
    monkeypatch.setattr("blyan_node.services.estimate.write_rate", lambda _, size: float(size))
    assert (await estimate(large, tmp_path)).write_bytes_per_s == 64 * limits.MIB


@trio_test
async def test_with_nothing_to_write_nothing_is_measured(tmp_path) -> None:
    found = Rehearsal(None, "n", 0, 1, 6_000, 6_000, 0, 10**9, seconds=2.0)
    pace = await estimate(found, tmp_path / "not there")
    assert (pace.seconds, pace.write_bytes_per_s) == (2.0, None)


@trio_test
async def test_a_disk_that_takes_no_sample_gives_no_estimate(tmp_path) -> None:
    found = Rehearsal(None, "n", 3, 1, 6_000, 0, 6_000, 10**9, seconds=2.0)
    pace = await estimate(found, tmp_path / "not there")
    assert (pace.seconds, pace.read_bytes_per_s) == (None, 3_000)


@trio_test
async def test_a_store_that_is_full_gives_no_estimate(tmp_path, monkeypatch) -> None:
    def full(*_: Any) -> float:
        raise DiskFull("the disk is full", "nothing was stored")

    monkeypatch.setattr("blyan_node.services.estimate.write_rate", full)
    found = Rehearsal(None, "n", 3, 1, 6_000, 0, 6_000, 10**9, seconds=2.0)
    assert (await estimate(found, tmp_path)).seconds is None
