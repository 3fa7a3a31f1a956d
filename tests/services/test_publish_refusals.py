"""What cannot be published is refused by name, and the store is as it was, row for row."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blyan_node.services import watched
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.publishing import publishing, rows
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import ErrorCode, Refused
from storage.fsck import check
from storage.store import Store, open_store

Change = Callable[[Path], object]


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "home" / "data") as store:
        yield store


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("tiny") / "a", sharded=True)


def _files(folder: Path) -> set[str]:
    """Everything that lies in a folder, however deep."""
    return {
        os.path.join(at, name)
        for at, folders, files in os.walk(folder)
        for name in (*folders, *files)
    }


def config(**fields: object) -> Change:
    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def _shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[1]


def weights(change: Callable[[dict[str, torch.Tensor], str], object]) -> Change:
    """Changes one tensor of one shard."""

    def apply(path: Path) -> None:
        found = load_file(_shard(path))
        change(found, min(found))
        save_file(found, _shard(path), {"format": "pt"})

    return apply


def _only_pickles(path: Path) -> None:
    for file in path.glob("*.safetensors*"):
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")


def _points_outside(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"][min(document["weight_map"])] = "../secret.safetensors"
    index.write_text(json.dumps(document))


def _one_shard_more(path: Path) -> None:
    """As a version that had more shards leaves it behind."""
    (path / "model-00099-of-00099.safetensors").write_bytes(_shard(path).read_bytes())


def _whole_and_in_shards(path: Path) -> None:
    save_file({"w": torch.zeros(3)}, path / "model.safetensors")


def _twice_in_shards(path: Path) -> None:
    first, second = sorted(path.glob("*.safetensors"))[:2]
    found = load_file(first)
    save_file(load_file(second) | {min(found): found[min(found)]}, second)


def header(change: Callable[[dict[str, dict[str, Any]]], object], more: bytes = b"") -> Change:
    """Rewrites the header of one shard, whose bytes stay, with `more` behind them."""

    def apply(path: Path) -> None:
        data = _shard(path).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        entries = json.loads(data[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        _shard(path).write_bytes(len(text).to_bytes(8, "little") + text + data[end:] + more)

    return apply


def _move(entries: dict[str, dict[str, Any]], by: int) -> None:
    """All tensors of a file but the first begin `by` bytes later."""
    entries.pop("__metadata__", None)
    for entry in sorted(entries.values(), key=lambda e: e["data_offsets"][0])[1:]:
        entry["data_offsets"] = [at + by for at in entry["data_offsets"]]


def _name_twice(path: Path) -> None:
    """A second entry of the same name, which a lenient reader takes for the first."""
    data = _shard(path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    name = min(entries.keys() - {"__metadata__"})
    text = data[8:end].rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(entries[name])}}}".encode()
    _shard(path).write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def _too_long_a_header(path: Path) -> None:
    length = limits.safetensors_header_bytes_max + 1
    _shard(path).write_bytes(length.to_bytes(8, "little") + b"{}")
    with _shard(path).open("r+b") as file:
        file.truncate(8 + 2 * length)


def link(name: str, target: str) -> Change:
    def apply(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(target)

    return apply


def _shard_links_to_itself(path: Path) -> None:
    link(_shard(path).name, _shard(path).name)(path)


def _directory_links_to_itself(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path)


def _pipe(path: Path) -> None:
    shard = _shard(path)
    shard.unlink()
    os.mkfifo(shard)


ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
BAD: dict[str, tuple[Change, str, str]] = {
    # what is wrong: how it comes about, what the refusal says, what its data names
    "shard": (lambda p: _shard(p).unlink(), "the shard .*00002-of-.* is missing", "path"),
    "half-a-shard": (
        lambda p: _shard(p).write_bytes(_shard(p).read_bytes()[:-5]), "bytes of tensors", "path",
    ),
    "no-shard": (lambda p: _shard(p).write_bytes(b"PK\x03\x04 zip"), "header of", "path"),
    "shape": (
        weights(lambda t, n: t.update({n: t[n][:1].clone()})),
        r"w1\.weight has the shape \[1, 40\], but config\.json asks for", "tensor",
    ),
    "dtype": (
        weights(lambda t, n: t.update({n: t[n].to(torch.int64)})), "is I64, .* reads F32", "tensor",
    ),
    "tensor": (weights(lambda t, n: t.pop(n)), r"w1\.weight' is missing", "tensor"),
    "one-too-many": (
        weights(lambda t, n: t.update(other=torch.zeros(3))), "'other' is nowhere by", "path",
    ),
    "one-shard-more": (_one_shard_more, "00099-of-00099.safetensors is one too many", "path"),
    "whole-and-in-shards": (_whole_and_in_shards, "is one too many: model.safetensors has", "path"),
    "in-two-shards": (_twice_in_shards, r"00002-of-.*weight' is in .*00001-of-.* by", "path"),
    "twice-in-a-shard": (_name_twice, "00002-of-.*weight' occurs twice", "path"),
    "overlap": (header(lambda e: _move(e, -4)), "begins at", "path"),
    "hole": (header(lambda e: _move(e, 4), bytes(4)), "begins at", "path"),
    "bytes-behind": (header(lambda e: None, bytes(4)), "but the header describes", "path"),
    "long-header": (_too_long_a_header, "a header of .* bytes does not fit", "path"),
    "loop": (_shard_links_to_itself, "Too many levels of symbolic links", "path"),
    "loop-of-directories": (_directory_links_to_itself, "is not a directory", "path"),
    "no-tokenizer-behind-its-link": (
        link("tokenizer.json", "../blobs/none"), "tokenizer.json is a link that leads nowhere",
        "path",
    ),
    "no-configuration-behind-its-link": (
        link("config.json", "config.json"), "config.json: Too many levels", "path",
    ),
    "pipe": (_pipe, "is no regular file", "path"),
    "activation": (config(hidden_act="gelu_new"), "hidden_act is 'gelu_new'", "field"),
    "rope": (config(rope_parameters=ROPE), "rope_type is 'llama3'", "field"),
    "quantisation": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config asks for 'gptq'", "field",
    ),
    "family": (config(model_type="llama"), "model_type 'llama'", "field"),
    "field": (config(rope_wobble=2), "'rope_wobble' is unknown", "field"),
    "pickles": (_only_pickles, r"pytorch_model\.bin is a pickle", "path"),
    "index": (_points_outside, "is no file name of a shard", "path"),
    "directory": (shutil.rmtree, "is not a directory", "path"),
    "configuration": (lambda p: (p / "config.json").unlink(), r"config\.json: No such", "path"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@trio_test
async def test_a_directory_that_is_wrong(store, tiny, tmp_path, name) -> None:
    change, why, names = BAD[name]
    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    change(path)
    publish, before, there = publishing(store), rows(store), _files(tmp_path)
    for attempt in (publish.publish, publish.rehearse):
        with pytest.raises(Refused, match=why) as refused:
            await attempt(path, "tiny")
        assert refused.value.code is ErrorCode.BAD_MODEL
        assert refused.value.data[names], refused.value.data
        assert rows(store) == before and _files(tmp_path) == there


@trio_test
async def test_another_configuration_under_the_name(store, tiny, tmp_path) -> None:
    publish = publishing(store)
    await publish.publish(tiny, "tiny")
    other = make_checkpoint("mixtral", tmp_path / "b", num_experts_per_tok=3)
    before = rows(store)
    for attempt in (publish.publish, publish.rehearse):
        with pytest.raises(Refused, match=r"with other config\.json") as refused:
            await attempt(other, "tiny")
        assert refused.value.code is ErrorCode.CONFLICT
        assert refused.value.data["files"] == ["config.json"]
        assert rows(store) == before


def by_quota(store: Store, room: int) -> None:
    store.chunks.quota_bytes = store.stats().chunk_bytes + room


def by_free_space(store: Store, room: int) -> None:
    store.chunks._free_bytes = lambda: limits.disk_reserve_bytes + room


BOUNDS = pytest.mark.parametrize(
    ("bound", "why"), [(by_quota, "--disk allows"), (by_free_space, "stay in reserve")]
)


@BOUNDS
@trio_test
async def test_a_model_too_large_for_the_disk(store, tiny, bound, why) -> None:
    """One byte too few is refused with the numbers; with that byte it is published."""
    publish = publishing(store)
    needed = (await publish.rehearse(tiny, "tiny")).new_bytes
    bound(store, needed - 1)
    before = rows(store)
    for attempt in (publish.publish, publish.rehearse):
        with pytest.raises(Refused, match=why) as refused:
            await attempt(tiny, "tiny")
        assert refused.value.code is ErrorCode.DISK_FULL
        data = refused.value.data
        assert (data["new_bytes"], data["room_bytes"]) == (needed, needed - 1)
        assert (data["path"], data["name"], data["reused_bytes"]) == (str(tiny), "tiny", 0)
        assert f"{needed} of its {data['bytes']} bytes" in str(refused.value)
        assert rows(store) == before
    bound(store, needed)
    assert (await publish.publish(tiny, "tiny")).blocks > 18


@BOUNDS
@trio_test
async def test_what_is_stored_already_needs_no_room(store, tiny, tmp_path, bound, why) -> None:
    publish = publishing(store)
    first = await publish.publish(tiny, "tiny")
    bound(store, 0)
    again = await publish.publish(tiny, "tiny")
    assert (again.blocks, again.root) == (0, first.root)
    assert (await publish.rehearse(tiny, "tiny")).room_bytes == 0
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    weights(lambda t, n: t.update({n: t[n] * 2}))(other)
    found = min(load_file(_shard(other)))
    bound(store, 100)
    before = rows(store)
    with pytest.raises(Refused, match=why) as refused:
        await publish.publish(other, "tiny")
    data = refused.value.data
    changed = load_file(_shard(other))[found].numel() * 4
    assert changed < data["new_bytes"] < changed + 4096, "the tensor and the release"
    assert data["bytes"] - data["reused_bytes"] == changed
    assert rows(store) == before
    bound(store, data["new_bytes"])
    assert (await publish.publish(other, "tiny")).blocks == 2


def _written_to(path: Path) -> None:
    with _shard(path).open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x11\x22\x33\x44")


def _replaced(path: Path) -> None:
    """As a tool does it that writes beside and renames: not a moment in which it is not there."""
    other = path.with_name("other")
    shutil.copyfile(_shard(path), other)
    other.replace(_shard(path))


@pytest.mark.parametrize("change", [_written_to, _replaced])
@pytest.mark.parametrize("at", [0.1, 0.9], ids=["early", "late"])
@trio_test
async def test_a_directory_that_changes_while_it_is_read(
    store, tiny, tmp_path, change, at, monkeypatch
) -> None:
    """Half of one version and half of another is no model: there is no release of it."""
    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    monkeypatch.setattr(watched, "PROGRESS_BYTES", 1_000)
    publish, changes = publishing(store), list[int]()

    def told(done: int, total: int | None, what: str) -> None:
        if not changes and done > at * (total or 0):
            changes.append(done)
            change(path)

    before = rows(store)
    for attempt in (publish.rehearse, publish.publish):
        changes.clear()
        with pytest.raises(Refused, match="it was changed while it was read") as refused:
            await attempt(path, "tiny", told)
        assert refused.value.code is ErrorCode.BAD_MODEL
        assert refused.value.data["path"] == str(_shard(path))
        assert attempt == publish.publish or rows(store) == before
    assert store.stats().accepted == 0 and check(store).ok
    done = await publish.publish(path, "tiny")
    assert done.reused_bytes > 0 and check(store).ok


@trio_test
async def test_weights_that_cannot_be_read_in_the_middle(store, tiny, tmp_path) -> None:
    """A file that goes away after the check is a refusal as well; what was stored is reused."""
    path = tmp_path / "model"
    shutil.copytree(tiny, path)
    publish = publishing(store)

    def vanishes(done: int, total: int | None, what: str) -> None:
        for shard in path.glob("*.safetensors"):
            shard.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watched, "PROGRESS_BYTES", 50_000)
        with pytest.raises(Refused, match="No such file") as refused:
            await publish.publish(path, "tiny", vanishes)
    assert refused.value.data["path"]
    assert store.stats().accepted == 0
    assert (await publish.publish(tiny, "tiny")).reused_bytes > 0
