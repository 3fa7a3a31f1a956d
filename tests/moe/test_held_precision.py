"""Whole models in each precision: every path computes what the plain reference does."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.experts import Expert
from blyan_node.moe.families import expert_layout, layout
from blyan_node.moe.layout import attention_part
from blyan_node.moe.numerics import Plain
from blyan_node.moe.precision import expert_bytes, hold, part_bytes
from blyan_node.moe.profile import Profiles, profile
from blyan_node.moe.stored import Mxfp4
from blyan_node.moe.trunk import Trunk
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine
from blyan_node.testing.mxfp4 import make_mxfp4_checkpoint
from blyan_node.testing.reference import open_reference
from protocols.dag.header import Kind
from protocols.errors import Refused
from protocols.ids import Subject
from protocols.precision import PRECISIONS, Precision
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry

NARROW: tuple[Precision, ...] = ("bfloat16", "float16", "fp8", "int8")
# How far the logits may be from those of what was published, relative to the largest: these
# checkpoints are hot, and a token that goes to another expert moves them by a tenth and more.
NEAR = {"bfloat16": 0.2, "float16": 0.1, "fp8": 0.9, "int8": 0.6}


@pytest.mark.slow
@pytest.mark.parametrize("precision", NARROW)
def test_an_engine_of_pieces_has_the_bits_of_the_reference(
    directory: Path, prompt: list[int], precision: Precision
) -> None:
    published, truth = _engine_and_reference(directory, prompt[:16], precision, best())
    first = (published[0] - truth[0]).abs().max() / published.abs().max()  # before anything adds up
    assert first < NEAR[precision]
    wide = Checkpoint.open(directory).load(Subject("embed"))["embed_tokens.weight"][0] == Dtype.F32
    assert torch.equal(published, truth) != (wide or precision in ("fp8", "int8"))


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3-odd", "gpt_oss"])
def test_so_it_does_with_torch(
    directories: dict[str, Path], name: str, prompt: list[int], precision: Precision
) -> None:
    published, truth = _engine_and_reference(directories[name], prompt[:12], precision, Plain())
    assert not torch.equal(published, truth)


def _engine_and_reference(
    path: Path, ids: list[int], precision: Precision, arithmetic: Arithmetic
) -> tuple[Tensor, Tensor]:
    """The reference's logits as published and in `precision`, which the engine's equal."""
    checkpoint = Checkpoint.open(path)
    engine = Engine(checkpoint.config, checkpoint.load, arithmetic, precision)
    (logits,) = engine.forward([(engine.trunk.new_cache(), ids)], random.Random(1))
    truth, _ = open_reference(path, arithmetic, precision).forward(ids)
    assert torch.equal(logits, truth)
    published, _ = open_reference(path, arithmetic).forward(ids)
    return published, truth


def test_float32_is_what_was_published(directories: dict[str, Path], prompt: list[int]) -> None:
    for name in ("mixtral-odd", "gpt_oss-odd"):
        wide, _ = open_reference(directories[name], precision="float32").forward(prompt[:9])
        published, _ = open_reference(directories[name]).forward(prompt[:9])
        assert torch.equal(wide, published)
        checkpoint = Checkpoint.open(directories[name])
        trunk = Trunk(checkpoint.config, checkpoint.load, best(), "float32")
        assert (trunk.copied, trunk.converted) == (0, [])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bytes_are_known_before_anything_is_loaded(
    directory: Path, precision: Precision
) -> None:
    checkpoint = Checkpoint.open(directory)
    total = 0
    for part in layout(checkpoint.config):
        given = checkpoint.load(part.subject)
        manifest = _manifest(checkpoint, part.subject)
        if part.kind is Kind.EXPERT:
            expert = Expert(checkpoint.config, part.subject, given, best(), precision)
            form = expert_layout(checkpoint.config, part.subject, given)
            assert expert.bytes == part_bytes(form, manifest, precision)
            assert expert.bytes <= expert_bytes(manifest, precision) < expert.bytes * 1.25
            assert expert.converted == (expert.copied > 0)
            assert expert.storage == precision or not expert.converted
        else:
            held = hold(part, given, precision)
            assert held.bytes <= part_bytes(part, manifest, precision)
            total += held.bytes
    assert Trunk(checkpoint.config, checkpoint.load, best(), precision).bytes == total


@pytest.mark.parametrize(
    "entry",
    [
        TensorEntry("extra", Dtype.F32, (2, 2), 16, ()),
        TensorEntry("self_attn.q_proj.weight", Dtype.F32, (4,), 16, ()),
    ],
)
def test_a_tensor_that_is_none_of_the_parts_is_refused_by_name(
    directories: dict[str, Path], entry: TensorEntry
) -> None:
    part = attention_part(Checkpoint.open(directories["mixtral"]).config, 0)
    for precision in PRECISIONS:
        with pytest.raises(Refused, match=rf"layer0.attention: '{entry.name}' .* none of its"):
            part_bytes(part, Manifest((entry,)), precision)


def _manifest(checkpoint: Checkpoint, subject: Subject) -> Manifest:
    given = checkpoint.load(subject).items()
    entries = (TensorEntry(name, *kind, len(data), ()) for name, (*kind, data) in given)
    return Manifest(tuple(entries))


def test_routers_norms_and_what_is_computed_with_from_both_sides_stay(
    directories: dict[str, Path],
) -> None:
    for name in ("mixtral", "deepseek_v3"):
        checkpoint = Checkpoint.open(directories[name])
        for part in layout(checkpoint.config):
            if part.kind is Kind.EXPERT:
                continue
            held = hold(part, checkpoint.load(part.subject), "int8")
            kinds = {role: getattr(one, "dtype", None) for role, one in held.tensors.items()}
            if part.kind is Kind.ROUTER:
                assert kinds["weight"] == torch.float32 and not held.converted
            elif part.subject.endswith("attention"):
                assert kinds["o"] is None and kinds["input_norm"] == torch.float32
                assert ("kv_b" in kinds) == (name == "deepseek_v3")
                assert kinds.get("kv_b", torch.float32) == torch.float32


def test_mxfp4_is_narrower_than_anything_that_can_be_asked_for(
    tmp_path: Path,
) -> None:
    checkpoint = Checkpoint.open(make_mxfp4_checkpoint(tmp_path / "packed"))
    subject = Subject("layer0.expert0")
    given = checkpoint.load(subject)
    part = expert_layout(checkpoint.config, subject, given)
    for precision in PRECISIONS:
        expert = Expert(checkpoint.config, subject, given, best(), precision)
        assert (expert.storage, expert.converted, expert.copied) == ("mxfp4", False, 0)
        down = hold(part, given, precision).tensors["down"]
        assert isinstance(down, Mxfp4) and down.whole_rows == (precision == "int8")


def test_the_profile_names_what_is_held() -> None:
    assert profile("sums3", "int8") == "cpu-sums3-int8"
    assert profile("sums3") == profile("sums3", "float32") == "cpu-sums3-published"
    mine = Profiles("sums3", "fp8")
    assert (mine.own, mine.of("as-published")) == ("cpu-sums3-fp8", "cpu-sums3-published")
    assert len({profile("sums3", one) for one in PRECISIONS}) == len(PRECISIONS) - 1
