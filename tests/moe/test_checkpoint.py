"""Directories: complete or refused by name; written back byte for byte."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.export import write_checkpoint
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.truth import logits_of
from protocols.dag.header import Kind
from protocols.errors import ErrorCode, Refused
from protocols.ids import Subject, parse_subject
from protocols.tensors.manifest import Dtype

PROMPT = list(range(2, 30))


@pytest.fixture
def copy(directories: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the plain mixtral, to be spoilt."""
    return Path(shutil.copytree(directories["mixtral"], tmp_path / "copy"))


@pytest.fixture
def sharded(directories: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the sharded gpt_oss, to be spoilt."""
    return Path(shutil.copytree(directories["gpt_oss-odd"], tmp_path / "copy"))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


def test_every_byte_belongs_to_one_subject(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    whole = _tensors(directory)
    assert checkpoint.size == sum(t.numel() * t.element_size() for t in whole.values())
    seen = 0
    for part in checkpoint.subjects:
        assert str(parse_subject(part.subject)) == part.subject
        for tensor, layout in zip(checkpoint.read(part.subject), part.tensors, strict=True):
            source = whole[layout.source]
            source = source if layout.index is None else source[layout.index]
            data = b"".join(tensor.pieces)
            assert data == source.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert (tensor.name, tensor.shape) == (layout.name, tuple(source.shape))
            seen += len(data)
    assert seen == checkpoint.size


def test_subjects_and_kinds(directories: dict[str, Path]) -> None:
    parts = {p.subject: p for p in Checkpoint.open(directories["mixtral"]).subjects}
    assert len(parts) == 1 + 3 * (1 + 1 + 6) + 2
    assert parts[Subject("layer2.expert5")].kind is Kind.EXPERT
    assert parts[Subject("layer0.router")].kind is Kind.ROUTER
    names = [t.name for t in parts[Subject("layer1.attention")].tensors]
    assert names[0] == "input_layernorm.weight" and names[-1] == "post_attention_layernorm.weight"
    tied = {p.subject for p in Checkpoint.open(directories["mixtral-odd"]).subjects}
    assert "head" not in tied and "embed" in tied


def test_small_files_travel_and_weights_do_not(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "m", sharded=True, tokenizer=True)
    (path / "README.md").write_text("# A model")
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04pickle")
    (path / ".hidden.json").write_text("{}")
    (path / "modeling.py").write_text("import os")
    (path / "figures").mkdir()
    assert set(Checkpoint.open(path).files) == {
        "README.md", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip


@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_an_export_is_byte_equal_and_loads(
    directory: Path, tmp_path: Path, shard_bytes: int
) -> None:
    source, out = Checkpoint.open(directory), tmp_path / "out"
    written = write_checkpoint(
        out, source.config, source.files, source.describe, source.read_tensor,
        shard_bytes=shard_bytes,
    )  # fmt: skip
    files = list(out.iterdir())
    assert (written.files, written.bytes) == (len(files), sum(f.stat().st_size for f in files))
    assert (out / "model.safetensors.index.json").exists() == (shard_bytes == 50_000)
    expected, got = _tensors(directory), _tensors(out)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor)
    for name, data in source.files.items():
        assert (out / name).read_bytes() == data
    assert Checkpoint.open(out).size == source.size
    if shard_bytes == 50_000:
        assert torch.equal(logits_of(out, PROMPT), logits_of(directory, PROMPT))


def test_what_nothing_computes_with_is_kept(directories: dict[str, Path], tmp_path: Path) -> None:
    """Older directories of DeepSeek-V3's family have the frequencies of their rotation."""
    path, out = tmp_path / "old", tmp_path / "out"
    shutil.copytree(directories["deepseek_v3"], path)
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    more = {name.format(layer): torch.full((4,), layer + 0.5) for layer in range(2)}
    save_file(_tensors(path) | more, path / "model.safetensors", {"format": "pt"})
    source = Checkpoint.open(path)
    write_checkpoint(out, source.config, source.files, source.describe, source.read_tensor)
    expected, got = _tensors(path), _tensors(out)
    assert expected.keys() == got.keys() and more.keys() < got.keys()
    assert all(torch.equal(got[one], tensor) for one, tensor in expected.items())
    assert torch.equal(logits_of(out, PROMPT), logits_of(directories["deepseek_v3"], PROMPT))
    ours = (open_reference(one).forward(PROMPT)[0] for one in (out, directories["deepseek_v3"]))
    assert torch.equal(next(ours), next(ours))


def test_an_export_refuses_what_does_not_fit(directories: dict[str, Path], tmp_path: Path) -> None:
    source = Checkpoint.open(directories["gpt_oss"])

    def half(subject: Subject) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
        described = source.describe(subject)
        if subject == "layer1.expert2":
            described["down_proj"] = (Dtype.BF16, described["down_proj"][1])
        return described

    with pytest.raises(Refused, match=r"layer1\.expert2 is BF16"):
        write_checkpoint(tmp_path / "a", source.config, source.files, half, source.read_tensor)
    with pytest.raises(Refused, match="0 bytes, expected"):
        write_checkpoint(
            tmp_path / "b", source.config, source.files, source.describe, lambda *_: iter(())
        )
    assert not (tmp_path / "b" / "config.json").exists()


def _drop(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _retensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return spoil


def _truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-5])


def _huge(path: Path) -> None:
    (path / "huge.json").touch()
    os.truncate(path / "huge.json", 1 << 27)


ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_drop("config.json"), "config.json: No such file"),
        (_drop("model.safetensors"), "neither model.safetensors nor"),
        (_retensor(lambda t: t.pop(ROUTER)), f"{ROUTER} is missing"),
        (_retensor(lambda t: t.update({ROUTER: torch.zeros(6, 41)})), r"\[6, 41\]"),
        (_retensor(lambda t: t.update({ROUTER: torch.zeros(6, 40).long()})), "is I64"),
        (_retensor(lambda t: t.update({"model.extra": torch.zeros(1)})), "'model.extra' does not"),
        (
            _retensor(lambda t: t.update({"model.layers.3.eh_proj.weight": torch.zeros(1)})),
            "'model.layers.3.eh_proj.weight' is of a layer behind the 3 .* num_nextn_predict",
        ),
        (_truncate, "bytes of tensors, but the header describes"),
        (lambda path: (path / "config.json").write_text("{"), "config.json"),
        (_huge, "huge.json is too large"),
    ],
)
def test_incomplete_is_refused_by_name(
    copy: Path, spoil: Callable[[Path], None], named: str
) -> None:
    spoil(copy)
    with pytest.raises(Refused, match=named) as refusal:
        Checkpoint.open(copy)
    assert refusal.value.code is ErrorCode.BAD_MODEL


def _reindex(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return spoil


HEAD = "lm_head.weight"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_reindex(lambda m: m.update({HEAD: "../../model.safetensors"})), "no file name"),
        (_reindex(lambda m: m.update({HEAD: "/etc/passwd"})), "no file name"),
        (_reindex(lambda m: m.update({HEAD: "pytorch_model.bin"})), "no file name"),
        (_reindex(lambda m: m.update({HEAD: 7})), "no file name"),
        (_reindex(lambda m: m.pop(HEAD)), "lm_head.weight' is nowhere by"),
        (_reindex(lambda m: m.update({"more": m[HEAD]})), "'more' is missing"),
        (lambda path: (path / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    ],
)
def test_a_wrong_index_is_refused_by_name(
    sharded: Path, spoil: Callable[[Path], None], named: str
) -> None:
    spoil(sharded)
    with pytest.raises(Refused, match=named):
        Checkpoint.open(sharded)


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(Refused, match=f"the shard {shard.name} is missing"):
        Checkpoint.open(sharded)


def test_links_are_followed(sharded: Path, tmp_path: Path) -> None:
    """The cache of huggingface_hub is a folder of links to files named by their hashes."""
    linked, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    linked.mkdir()
    blobs.mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (linked / file.name).symlink_to(f"../blobs/{number}")
    ours, theirs = Checkpoint.open(linked), Checkpoint.open(sharded)
    assert (ours.files, ours.subjects) == (theirs.files, theirs.subjects)
    assert ours.load(ours.subjects[0].subject) == theirs.load(ours.subjects[0].subject)


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=re.escape("nowhere is not a directory")):
        Checkpoint.open(tmp_path / "nowhere")
