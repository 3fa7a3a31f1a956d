"""DeepSeek-V3 and Qwen3-MoE in FP8 as released: read, held and exported as they are, exact."""

import json
import random
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blyan_node.moe import stored
from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.arrays import write_tensors
from blyan_node.moe.checkpoint import INDEX_FILE, Checkpoint
from blyan_node.moe.contract import Contract
from blyan_node.moe.experts import Expert
from blyan_node.moe.export import write_checkpoint
from blyan_node.moe.families import layout
from blyan_node.moe.numerics import Plain
from blyan_node.moe.precision import hold, part_bytes
from blyan_node.moe.stored import Fp8Blocks
from blyan_node.testing.arithmetic import best
from blyan_node.testing.directories import tensor_digests
from blyan_node.testing.engine import Engine
from blyan_node.testing.exact_arithmetic import Exact
from blyan_node.testing.fp8 import (
    as_transformers_widens,
    dequantised,
    make_fp8_checkpoint,
    quantise,
)
from blyan_node.testing.reference import open_reference
from blyan_node.testing.truth import greedy, logits_of
from protocols import limits
from protocols.errors import Refused
from protocols.ids import ChunkHash, Subject
from protocols.precision import PRECISIONS, Precision
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry

pytestmark = pytest.mark.slow  # whole models, many of them

PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(48)]
EXPERT = Subject("layer2.expert2")
CHUNK = ChunkHash(bytes(32))
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"mtp": True, "sharded": True},
    "qwen3_moe": {"scales": torch.bfloat16, "norm_topk_prob": True},
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("fp8")
    return {
        family: make_fp8_checkpoint(family, root / family, **options)
        for family, options in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def widened(directories: dict[str, Path]) -> dict[str, Path]:
    """The same weights in float32."""
    return {
        name: dequantised(path, path.with_name(f"{name}-float32"))
        for name, path in directories.items()
    }


@pytest.fixture(scope="module")
def truths(widened: dict[str, Path]) -> dict[str, Tensor]:
    return {name: logits_of(path, PROMPT) for name, path in widened.items()}


def _error(path: Path, truth: Tensor) -> float:
    logits, _ = open_reference(path).forward(PROMPT)
    return float((logits - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_tokens_are_those_of_the_widened_weights(
    directories: dict[str, Path], widened: dict[str, Path], truths: dict[str, Tensor], family: str
) -> None:
    assert _error(directories[family], truths[family]) < 1e-4
    tokens = open_reference(directories[family]).generate(PROMPT, 12)
    assert tokens == greedy(widened[family], PROMPT, 12) and len(set(tokens)) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_swarm_computes_equals_the_reference(
    directories: dict[str, Path], family: str
) -> None:
    """With the kernels and with torch; and the kernels equal the written order."""
    checkpoint = Checkpoint.open(directories[family])
    choices: list[tuple[Arithmetic, Precision]] = [
        (best(), "as-published"), (best(), "int8"), (Plain(), "as-published")
    ]  # fmt: skip
    for arithmetic, precision in choices:
        expected, _ = open_reference(directories[family], arithmetic, precision).forward(PROMPT)
        engine = Engine(checkpoint.config, checkpoint.load, arithmetic, precision)
        cache, composed = engine.trunk.new_cache(), random.Random(3)
        cuts = (PROMPT[:31], PROMPT[31:47], PROMPT[47:])
        logits = [engine.forward([(cache, ids)], composed)[0] for ids in cuts]
        assert torch.equal(torch.cat(logits), expected)
        if isinstance(arithmetic, Contract):
            exact, _ = open_reference(directories[family], Exact(), precision).forward(PROMPT[:4])
            assert torch.equal(exact, expected[:4])


def _turned(scales: Tensor) -> Tensor:
    return scales.t().reshape(scales.shape)


def _last_partial(scales: Tensor) -> Tensor:
    wrong = scales.clone()
    wrong[-1], wrong[:, -1] = wrong[0], wrong[:, 0]
    return wrong


MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _turned,
    "inverse": torch.reciprocal,
    "last partial block": _last_partial,
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_scale_shows(
    directories: dict[str, Path], truths: dict[str, Tensor], family: str, mistake: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    right = Fp8Blocks.__init__

    def wrong(self: Fp8Blocks, codes: Tensor, scales: Tensor) -> None:
        right(self, codes, MISTAKES[mistake](scales))

    monkeypatch.setattr(Fp8Blocks, "__init__", wrong)
    error = _error(directories[family], truths[family])
    assert not error < 5e-3


def test_transformers_widens_a_matrix_to_the_same_values() -> None:
    codes, scales = quantise(torch.randn(384, 256, generator=torch.Generator().manual_seed(1)))
    scales *= torch.rand(scales.shape) + 0.5
    ours = stored.widened(Fp8Blocks(codes, scales))
    assert torch.equal(ours, as_transformers_widens(codes, scales))
    assert not torch.equal(ours, as_transformers_widens(codes, _last_partial(scales)))


def _manifest(given: dict[str, tuple[Dtype, tuple[int, ...], memoryview]]) -> Manifest:
    entries = (TensorEntry(n, dtype, s, len(data), ()) for n, (dtype, s, data) in given.items())
    return Manifest(tuple(entries))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_are_held_as_they_are_stored_in_every_precision(
    directories: dict[str, Path], family: str, precision: Precision
) -> None:
    """But embedding and head, which are no FP8, and the matrix that is computed with by columns."""
    checkpoint = Checkpoint.open(directories[family])
    for part in layout(checkpoint.config):
        given = checkpoint.load(part.subject)
        held = hold(part, given, precision)
        assert held.bytes == part_bytes(part, _manifest(given), precision)
        if part.subject in ("embed", "head", "final") or part.subject.endswith("router"):
            continue
        assert not held.converted
        twice = 4 * prod(held.tensors["kv_b"].shape) if "kv_b" in held.tensors else 0
        assert held.copied == twice
        packed = {n for n, one in held.tensors.items() if isinstance(one, Fp8Blocks)}
        assert packed == {n for n, one in held.tensors.items() if len(one.shape) == 2} - {"kv_b"}
    expert = Expert(checkpoint.config, EXPERT, checkpoint.load(EXPERT), best())
    assert expert.storage == "fp8_blocks" and expert.copied == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_byte_equal(directories: dict[str, Path], tmp_path: Path, family: str) -> None:
    path = directories[family]
    checkpoint = Checkpoint.open(path)
    write_checkpoint(
        tmp_path, checkpoint.config, checkpoint.files, checkpoint.describe, checkpoint.read_tensor
    )
    assert tensor_digests(tmp_path) == tensor_digests(path)
    assert (tmp_path / "config.json").read_bytes() == (path / "config.json").read_bytes()
    assert Checkpoint.open(tmp_path).subjects == checkpoint.subjects


def test_a_layer_that_predicts_further_tokens_is_kept_and_never_computed(
    directories: dict[str, Path],
) -> None:
    checkpoint = Checkpoint.open(directories["deepseek_v3"])
    kept = [part for part in checkpoint.subjects if part.subject.endswith(".mtp")]
    assert [part.subject for part in kept] == ["layer3.mtp"]
    names = {tensor.name for tensor in kept[0].tensors}
    assert {"eh_proj.weight", "enorm.weight", "shared_head.head.weight"} < names
    assert {"mlp.experts.3.up_proj.weight", "mlp.experts.3.up_proj.weight_scale_inv"} < names
    assert "layer3.mtp" not in {part.subject for part in layout(checkpoint.config)}
    read: list[Subject] = []

    def load(subject: Subject) -> dict[str, tuple[Dtype, tuple[int, ...], memoryview]]:
        read.append(subject)
        return checkpoint.load(subject)

    Engine(checkpoint.config, load)
    assert "layer3.mtp" not in read and "layer2.expert0" in read


def test_a_kept_layer_that_one_manifest_cannot_list_is_refused(
    directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directories["deepseek_v3"]
    kept = next(p for p in Checkpoint.open(path).subjects if p.subject == "layer3.mtp")
    entries = (
        TensorEntry(t.name, t.dtype, t.shape, t.size, (CHUNK,) * -(-t.size // limits.chunk_bytes))
        for t in Checkpoint.open(path).read(kept.subject)
    )
    _, listed = Manifest(tuple(entries)).encode()
    monkeypatch.setattr(limits, "manifest_bytes_max", len(listed))
    with pytest.raises(Refused, match=r"layer3.mtp, which is kept .* too large for one block"):
        Checkpoint.open(path)
    monkeypatch.setattr(limits, "manifest_bytes_max", 2 * len(listed))
    Checkpoint.open(path)


def test_a_layer_behind_those_that_are_counted_is_refused(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    for file in directories["deepseek_v3"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(fields | {"num_nextn_predict_layers": 0}))
    with pytest.raises(Refused, match=r"'model.layers.3.* behind the 3 of config.json"):
        Checkpoint.open(tmp_path)


def test_a_tensor_that_is_named_like_a_kept_layer_is_refused(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    """It would be published under no name, in a manifest that nobody reads, its author included."""
    path, named = directories["deepseek_v3"], "model.layers.3."
    for file in path.iterdir():
        if file.name != INDEX_FILE:
            (tmp_path / file.name).symlink_to(file)
    index = json.loads((path / INDEX_FILE).read_text())
    index["weight_map"][named] = "nameless.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    write_tensors(tmp_path / "nameless.safetensors", {named: torch.zeros(1)})
    with pytest.raises(Refused, match=r"the tensor model.layers.3. has no name of its own"):
        Checkpoint.open(tmp_path)


def test_floats_where_config_json_promises_fp8_are_refused(
    widened: dict[str, Path], directories: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").symlink_to(widened["qwen3_moe"] / "model.safetensors")
    (tmp_path / "config.json").symlink_to(directories["qwen3_moe"] / "config.json")
    with pytest.raises(Refused, match=r"_proj.weight_scale_inv is missing"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 2.0**101])
def test_a_scale_that_cannot_be_computed_with_is_refused(scale: float) -> None:
    codes, scales = quantise(torch.ones(130, 5))
    scales[1, 0] = scale
    with pytest.raises(Refused, match="an FP8 scale is no number up to"):
        Fp8Blocks(codes, scales)
