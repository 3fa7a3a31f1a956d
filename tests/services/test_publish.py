"""Publishing, updating, exporting and verifying over a store alone."""

import errno
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
from safetensors.torch import load_file, save_file

from blyan_node.moe.safetensors_file import read_pieces
from blyan_node.services import update
from blyan_node.services.export import Export
from blyan_node.services.publish import Publish
from blyan_node.services.supply import Supply
from blyan_node.services.update import Update
from blyan_node.services.verify import Verify
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.publishing import LoneChain, author
from blyan_node.testing.trio_tests import trio_test
from protocols.dag.header import Block
from protocols.dag.heads import heads_of
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text, model_root
from storage.blocks import ManifestRow
from storage.fsck import check
from storage.gc import collect, drop_body
from storage.pins import Pin
from storage.store import Store, open_store

EXPERT = Subject("layer1.expert2")


class Nobody:
    """A network without peers."""

    async def fetch(self, blocks: Any, progress: Any) -> None:
        raise Refused(ErrorCode.BLOCK_MISSING, "no peer", "nobody is there")


@dataclass
class Node:
    """The services of one author on one store."""

    store: Store
    publish: Publish
    update: Update
    export: Export
    verify: Verify


def node(store: Store, name: str = "alice") -> Node:
    chain, limiter = LoneChain(store), trio.CapacityLimiter(1)
    signs = author(store, name)
    return Node(
        store,
        Publish(store, chain, signs, limiter),
        Update(store, chain, signs, limiter),
        Export(store, Supply(store, Nobody()), limiter),
        Verify(store, limiter),
    )


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "home" / "data") as store:
        yield store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("tiny") / "a", sharded=True)


def tensors(path: Path) -> dict[str, bytes]:
    """Every tensor of a directory as raw bytes with type and shape."""
    found = {k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()}
    return {k: (str(v.dtype), tuple(v.shape), v.numpy().tobytes()) for k, v in found.items()}


def changed(tiny: Path, out: Path, scale: float = 0.5) -> Path:
    """A copy of the directory in which one expert has other weights."""
    shutil.copytree(tiny, out)
    for file in out.glob("*.safetensors"):
        found = load_file(file)
        hit = [n for n in found if "layers.1." in n and "experts.2." in n]
        if hit:
            for name in hit:
                found[name] = found[name] * scale
            save_file(found, file, {"format": "pt"})
    return out


@trio_test
async def test_published_exported_and_nothing_new_the_second_time(store, tiny, tmp_path) -> None:
    alice = node(store)
    told: list[tuple[int, int, str]] = []
    first = await alice.publish.publish(tiny, "tiny", lambda *a: told.append(a))
    subjects = store.heads(first.model)
    assert first.blocks == len(subjects) + 2
    assert first.experts == 18
    assert first.bytes == told[-1][0] == told[-1][1]
    assert first.root == model_root(first.model, subjects)
    assert store.stats().staged == 0
    exported = await alice.export.export(first.model, tmp_path / "out")
    assert tensors(tmp_path / "out") == tensors(tiny)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny / name).read_bytes()
    assert exported.files == len(list((tmp_path / "out").iterdir()))

    log = store.stats().accepted
    again = await alice.publish.publish(tiny, "tiny")
    assert (again.model, again.root, again.blocks) == (first.model, first.root, 0)
    assert again.reused_bytes == again.bytes == first.bytes
    assert store.stats().accepted == log
    verified = await alice.verify.verify(first.model)
    assert verified.ok and verified.blocks == len(subjects) + 2
    assert check(store).ok


@trio_test
async def test_a_second_version_stores_what_changed(store, tiny, tmp_path) -> None:
    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    before, stored = dict(store.heads(first.model)), store.stats().chunk_bytes
    second = await alice.publish.publish(changed(tiny, tmp_path / "b"), "tiny")
    after = store.heads(first.model)
    assert {s for s in after if after[s] != before[s]} == {EXPERT}
    assert second.model == first.model and second.root != first.root and second.blocks == 2
    assert store.block(after[EXPERT]).header.base == before[EXPERT]
    expert = store.block(after[EXPERT]).header.size
    release = store.block(
        store.successors(
            store.releases(first.model)[0]
            if store.successors(store.releases(first.model)[0])
            else store.releases(first.model)[1]
        )[0]
    ).header.size
    assert store.stats().chunk_bytes - stored == expert + release
    assert second.reused_bytes == second.bytes - expert
    old = await alice.export.export(first.model, tmp_path / "old", first.root)
    assert tensors(old.path) == tensors(tiny)
    assert check(store).ok


@trio_test
async def test_other_files_under_the_same_name_are_refused(store, tiny, tmp_path) -> None:
    alice = node(store)
    await alice.publish.publish(tiny, "tiny")
    other = make_checkpoint("mixtral", tmp_path / "b", num_experts_per_tok=3)
    with pytest.raises(Refused, match=r"config\.json") as refused:
        await alice.publish.publish(other, "tiny")
    assert refused.value.code is ErrorCode.CONFLICT
    assert (await alice.publish.publish(other, "other")).name == "other"


@trio_test
async def test_an_interrupted_publish_goes_on_where_it_was(store, tiny) -> None:
    alice = node(store)
    submitted = alice.publish._chain

    class Dies:
        async def submit(self, *args: Any) -> None:
            raise trio.BrokenResourceError

    alice.publish._chain = Dies()
    with pytest.raises(trio.BrokenResourceError):
        await alice.publish.publish(tiny, "tiny")
    staged = store.stats()
    assert staged.accepted == 0 and staged.staged > 18
    assert collect(store) == 0  # not even the body of the release that came to nothing
    alice.publish._chain = submitted
    first = await alice.publish.publish(tiny, "tiny")
    assert first.reused_bytes == first.bytes
    assert first.blocks == store.stats().accepted == staged.staged
    assert store.stats().staged == 0 and check(store).ok


@trio_test
async def test_a_cancelled_publish_leaves_a_clean_store(store, tiny, monkeypatch) -> None:
    monkeypatch.setattr("blyan_node.services.watched.PROGRESS_BYTES", 1_000)
    alice = node(store)
    with trio.CancelScope() as scope:
        await alice.publish.publish(
            tiny, "tiny", lambda done, *_: scope.cancel() if done > 100_000 else None
        )
    assert scope.cancelled_caught
    assert check(store).ok and store.stats().accepted == 0
    assert (await alice.publish.publish(tiny, "tiny")).reused_bytes > 0


@trio_test
async def test_an_update_is_a_compare_and_swap(store, tiny, tmp_path) -> None:
    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    head = store.heads(first.model)[EXPERT]
    _, manifest = store.body(head)
    weights = {
        name.split("experts.2.")[1]: tensor
        for f in changed(tiny, tmp_path / "b").glob("*.safetensors")
        for name, tensor in load_file(f).items()
        if "layers.1." in name and "experts.2." in name
    }
    assert set(weights) == {e.name for e in manifest.tensors}
    file = tmp_path / "w.safetensors"
    save_file(weights, file)
    updated = await alice.update.update(first.model, EXPERT, file, head)
    assert updated.base == head and store.heads(first.model)[EXPERT] == updated.block
    assert updated.root == model_root(first.model, store.heads(first.model)) != first.root
    assert store.pins.of(updated.block) == {Pin.PUBLISHED}
    with pytest.raises(Refused, match="its head is") as stale:
        await alice.update.update(first.model, EXPERT, file, head)
    assert stale.value.data["head"] == cid_text(updated.block)
    same = await alice.update.update(first.model, EXPERT, file)
    assert (same.block, same.root) == (updated.block, updated.root)
    assert check(store).ok


class Watching(LoneChain):
    """Calls `seen` with what is submitted, before it is decided about."""

    def __init__(self, store: Store, seen: Callable[[Block], Awaitable[None]]) -> None:
        super().__init__(store)
        self.seen = seen

    async def submit(
        self, blocks: Sequence[Block], manifests: Sequence[ManifestRow], source: None
    ) -> None:
        await self.seen(blocks[0])
        await super().submit(blocks, manifests, source)


def expert_file(store: Store, model: BlockId, path: Path, value: float) -> Path:
    import torch

    _, manifest = store.body(store.heads(model)[EXPERT])
    save_file({e.name: torch.full(e.shape, value) for e in manifest.tensors}, path)
    return path


@trio_test
async def test_an_update_during_a_publish_replaces_what_was_published(
    store, tiny, tmp_path
) -> None:
    """The publish has read the heads: an update that read the same ones would be a fork."""
    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    file = expert_file(store, first.model, tmp_path / "w.safetensors", 0.25)
    updating: list[Block] = []

    async def seen(block: Block) -> None:
        if block.header.subject is not None:
            updating.append(block)
            return
        nursery.start_soon(alice.update.update, first.model, EXPERT, file)
        while not updating and not signs.turn.statistics().tasks_waiting:
            await trio.sleep(0)

    alice.publish._chain = alice.update._chain = Watching(store, seen)
    signs = alice.publish._author
    async with trio.open_nursery() as nursery:
        await alice.publish.publish(changed(tiny, tmp_path / "b"), "tiny")
        published = store.heads(first.model)[EXPERT]
    (update,) = updating
    assert update.header.base == published
    assert store.heads(first.model)[EXPERT] == update.id
    whole = heads_of(first.model, store)
    assert whole is not None and not whole.forks
    assert check(store).ok


@trio_test
async def test_what_others_are_told_of_is_kept_from_before_they_are_told(
    store, tiny, tmp_path
) -> None:
    """Its pins and its chunks outlive a cancellation, a crash and a collection at that moment."""
    alice = node(store)

    async def seen(block: Block) -> None:
        collect(store)
        assert store.is_stored(block.id)
        assert Pin.PUBLISHED in store.pins.of(block.id)

    alice.publish._chain = alice.update._chain = Watching(store, seen)
    first = await alice.publish.publish(tiny, "tiny")
    file = expert_file(store, first.model, tmp_path / "w.safetensors", 0.25)
    await alice.update.update(first.model, EXPERT, file)
    for id in (first.model, *store.heads(first.model).values(), *store.releases(first.model)):
        assert store.pins.of(id) == {Pin.PUBLISHED} and store.is_stored(id)


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "dtype"])
@trio_test
async def test_an_update_with_other_tensors_is_refused(store, tiny, tmp_path, fault) -> None:
    import torch

    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    _, manifest = store.body(store.heads(first.model)[EXPERT])
    weights = {e.name: torch.zeros(e.shape) for e in manifest.tensors}
    name = next(iter(weights))
    if fault == "missing":
        del weights[name]
    elif fault == "surplus":
        weights["other"] = torch.zeros(1)
    elif fault == "shape":
        weights[name] = weights[name][:1].clone()
    else:
        weights[name] = weights[name].to(torch.bfloat16)
    save_file(weights, tmp_path / "w.safetensors")
    log = store.stats().accepted
    with pytest.raises(Refused, match=r"layer1\.expert2 was not updated"):
        await alice.update.update(first.model, EXPERT, tmp_path / "w.safetensors")
    assert store.stats().accepted == log


@trio_test
async def test_an_update_from_a_file_that_changes_is_refused(
    store, tiny, tmp_path, monkeypatch
) -> None:
    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    file = expert_file(store, first.model, tmp_path / "w.safetensors", 0.25)
    before = dict(store.heads(first.model))

    def pieces(path: Path, begin: int, size: int) -> Iterator[bytes]:
        yield from read_pieces(path, begin, size)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(update, "read_pieces", pieces)
    with pytest.raises(Refused, match="it was changed while it was read") as refused:
        await alice.update.update(first.model, EXPERT, file)
    assert refused.value.data["path"] == str(file)
    assert store.heads(first.model) == before and store.stats().staged == 0
    assert check(store).ok


@trio_test
async def test_only_the_author_updates(store, tiny, tmp_path) -> None:
    first = await node(store).publish.publish(tiny, "tiny")
    with pytest.raises(Refused, match="only its author") as refused:
        await node(store, "bob").update.update(first.model, EXPERT, tmp_path / "none")
    assert refused.value.code is ErrorCode.NOT_ALLOWED


@trio_test
async def test_verify_names_a_dropped_and_a_damaged_block(store, tiny) -> None:
    from storage import keys

    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    dropped, damaged = (store.heads(first.model)[s] for s in (EXPERT, Subject("embed")))
    assert drop_body(store, dropped) > 0
    name = store.body(damaged)[1].tensors[0].chunks[0]
    seq, _ = store.chunks.find(name)
    key = keys.DATA.key(seq, name)
    data = bytearray(store.chunks.data.get(key))
    data[7] ^= 1
    store.chunks.data.batch([(key, bytes(data))])
    found = await alice.verify.verify(first.model)
    assert {(b.subject, b.block) for b in found.bad} == {(EXPERT, dropped), ("embed", damaged)}
    assert {b.block for b in check(store).bad} >= {cid_text(dropped), cid_text(damaged)}


@trio_test
async def test_an_export_never_mixes_with_what_is_there(store, tiny, tmp_path) -> None:
    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    with pytest.raises(Refused, match="not empty"):
        await alice.export.export(first.model, tmp_path / "out")
    with pytest.raises(Refused, match="no such root"):
        await alice.export.export(first.model, tmp_path / "o", type(first.root)(bytes(32)))
    drop_body(store, store.heads(first.model)[EXPERT])
    with pytest.raises(Refused, match="nobody is there"):
        await alice.export.export(first.model, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@trio_test
async def test_an_export_says_whether_the_disk_or_the_place_is_at_fault(
    store, tiny, tmp_path, monkeypatch
) -> None:
    alice = node(store)
    first = await alice.publish.publish(tiny, "tiny")
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(Refused, match=r"Not a directory.*may write to") as place:
        await alice.export.export(first.model, tmp_path / "file" / "out")
    assert place.value.code is ErrorCode.BAD_INPUT

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("blyan_node.services.export.write_checkpoint", full)
    with pytest.raises(Refused, match=r"No space left.*free some space") as disk:
        await alice.export.export(first.model, tmp_path / "out")
    assert disk.value.code is ErrorCode.DISK_FULL
