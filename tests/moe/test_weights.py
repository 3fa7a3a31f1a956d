"""Loading: float32 stays where it lies, bfloat16 is widened once, what does not fit is named."""

from pathlib import Path

import numpy as np
import pytest
import torch

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.experts import Expert
from blyan_node.moe.families import expert_layout
from blyan_node.moe.trunk import Trunk
from blyan_node.moe.weights import Weights, load_part
from protocols.errors import ErrorCode, Refused
from protocols.ids import Subject
from protocols.tensors.manifest import Dtype

EXPERT = Subject("layer1.expert2")


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss"])
def test_float32_is_used_in_place(directories: dict[str, Path], variant: str) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    given = {
        name: (dtype, shape, view.toreadonly())
        for name, (dtype, shape, view) in checkpoint.load(EXPERT).items()
    }
    loaded = load_part(expert_layout(checkpoint.config, EXPERT, given), given)
    assert {n: t.data_ptr() for n, t in loaded.items()} == {
        n: _address(view) for n, (_, _, view) in given.items()
    }
    size = sum(len(view) for _, _, view in given.values())
    assert Expert(checkpoint.config, EXPERT, given).bytes == size


@pytest.mark.parametrize("variant", ["mixtral-odd", "gpt_oss-odd"])
def test_bfloat16_is_widened_and_counted(directories: dict[str, Path], variant: str) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    given = checkpoint.load(EXPERT)
    loaded = load_part(expert_layout(checkpoint.config, EXPERT, given), given)
    for name, (dtype, _, view) in given.items():
        assert dtype is Dtype.BF16 and loaded[name].dtype == torch.float32
        narrowed = loaded[name].bfloat16().view(torch.uint8).numpy().tobytes()
        assert narrowed == bytes(view)
    assert Expert(checkpoint.config, EXPERT, given).bytes == 2 * sum(
        len(v) for _, _, v in given.values()
    )


def test_a_buffer_at_an_odd_address_gives_the_same_bits(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["mixtral"])
    given = checkpoint.load(EXPERT)
    moved: Weights = {n: (d, s, _moved(view)) for n, (d, s, view) in given.items()}
    rows = torch.randn(5, checkpoint.config.hidden)
    expected = Expert(checkpoint.config, EXPERT, given).apply(rows)
    assert torch.equal(Expert(checkpoint.config, EXPERT, moved).apply(rows), expected)


def _moved(view: memoryview) -> memoryview:
    memory = np.empty(len(view) + 128, np.uint8)
    first = -memory.ctypes.data % 64 + 4
    memory[first : first + len(view)] = np.frombuffer(view, np.uint8)
    return memory.data[first : first + len(view)]


def test_what_does_not_fit_is_named(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["mixtral"])
    given = checkpoint.load(EXPERT)
    dtype, shape, view = given["w2.weight"]
    for change, named in (
        ({"w2.weight": (dtype, (1, *shape), view)}, "w2.weight is F32"),
        ({"w2.weight": (Dtype.U8, shape, view)}, "w2.weight is U8"),
        ({"w2.weight": (dtype, shape, view[:-4])}, "w2.weight has 8956 bytes"),
        ({"w9.weight": (dtype, shape, view)}, "'w9.weight' is none"),
    ):
        with pytest.raises(Refused, match=named) as refusal:
            Expert(checkpoint.config, EXPERT, {**given, **change})
        assert refusal.value.code is ErrorCode.BAD_MODEL
    given.pop("w1.weight")
    with pytest.raises(Refused, match=r"no tensor w1\.weight"):
        Expert(checkpoint.config, EXPERT, given)


def test_a_trunk_reads_everything_but_experts(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    asked: list[Subject] = []

    def tensors(subject: Subject) -> Weights:
        asked.append(subject)
        return checkpoint.load(subject)

    trunk = Trunk(checkpoint.config, tensors)
    assert sorted(asked) == sorted(
        part.subject for part in checkpoint.subjects if "expert" not in part.subject
    )
    floats = sum(np.prod(shape) for s in asked for _, shape in checkpoint.describe(s).values())
    assert trunk.bytes == 4 * floats
    with pytest.raises(Refused, match="token id 97"):
        trunk.embed([1, 97])
