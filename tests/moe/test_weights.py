"""Loading: everything stays where and as it lies, and what does not fit is named."""

import gc
import random
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from blyan_node.moe.arithmetic import choose
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.devices import OnDevice
from blyan_node.moe.experts import Expert
from blyan_node.moe.families import expert_layout
from blyan_node.moe.here import Here
from blyan_node.moe.numerics import Plain
from blyan_node.moe.trunk import Trunk
from blyan_node.moe.weights import Weights, load_part
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine
from protocols.errors import ErrorCode, Refused
from protocols.ids import Subject
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

EXPERT = Subject("layer1.expert2")


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss", "mixtral-odd", "gpt_oss-odd"])
def test_tensors_are_used_in_place_and_as_they_are(
    directories: dict[str, Path], variant: str
) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    given = {
        name: (dtype, shape, view.toreadonly())
        for name, (dtype, shape, view) in checkpoint.load(EXPERT).items()
    }
    loaded = load_part(expert_layout(checkpoint.config, EXPERT, given), given)
    assert {n: t.data_ptr() for n, t in loaded.items()} == {
        n: _address(view) for n, (_, _, view) in given.items()
    }
    for name, (_, _, view) in given.items():
        assert loaded[name].view(torch.uint8).numpy().tobytes() == bytes(view)
    expert = Expert(checkpoint.config, EXPERT, given, best())
    assert expert.bytes == sum(len(view) for _, _, view in given.values())
    assert expert.copied == 0


@pytest.mark.parametrize("name", ["best", "torch"])
def test_a_buffer_at_an_odd_address_gives_the_same_bits(
    directories: dict[str, Path], name: str
) -> None:
    """The kernels read it there, torch needs a copy of float32."""
    rules = best() if name == "best" else choose("torch")
    checkpoint = Checkpoint.open(directories["mixtral"])
    given = checkpoint.load(EXPERT)
    moved: Weights = {n: (d, s, _moved(view)) for n, (d, s, view) in given.items()}
    rows = torch.randn(5, checkpoint.config.hidden)
    expected = Expert(checkpoint.config, EXPERT, given, rules).apply(rows)
    expert = Expert(checkpoint.config, EXPERT, moved, rules)
    assert torch.equal(expert.apply(rows), expected)
    assert expert.copied == (0 if rules.aligned_bytes == 1 else expert.bytes)


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
            Expert(checkpoint.config, EXPERT, {**given, **change}, best())
        assert refusal.value.code is ErrorCode.BAD_MODEL
    given.pop("w1.weight")
    with pytest.raises(Refused, match=r"no tensor w1\.weight"):
        Expert(checkpoint.config, EXPERT, given, best())


def test_a_trunk_reads_everything_but_experts(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    asked: list[Subject] = []

    def tensors(subject: Subject) -> Weights:
        asked.append(subject)
        return checkpoint.load(subject)

    trunk = Trunk(checkpoint.config, tensors, best())
    assert sorted(asked) == sorted(
        part.subject for part in checkpoint.subjects if "expert" not in part.subject
    )
    assert trunk.bytes == sum(
        np.prod(shape) * DTYPE_BYTES[dtype]
        for subject in asked
        for dtype, shape in checkpoint.describe(subject).values()
    )
    assert trunk.copied == 0
    with pytest.raises(Refused, match="token id 97"):
        trunk.embed([1, 97])


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("arithmetic", ["best", "torch", "device"])
def test_what_is_let_go_is_gone_at_once(
    directories: dict[str, Path], variant: str, arithmetic: str
) -> None:
    """The memory counts as free from then on: on a device nothing else would give it back."""
    rules = {"best": best, "torch": Plain, "device": lambda: OnDevice(torch.device("cpu"))}
    checkpoint, held = Checkpoint.open(directories[variant]), list[weakref.ref[object]]()

    def tensors(subject: Subject) -> Weights:
        given = checkpoint.load(subject)
        held.extend(weakref.ref(data.obj) for _, _, data in given.values())
        return given

    gc.disable()
    try:
        engine = Engine(checkpoint.config, tensors, rules[arithmetic]())
        cache = engine.trunk.new_cache()
        engine.forward([(cache, [5, 6, 7])], random.Random(1))
        here = Here(checkpoint.config, engine.experts_by_place())
        assert isinstance(engine.trunk.enter([8], cache, here, slice(None)), torch.Tensor)
        assert all(one() is not None for one in held)
        del engine, here
        assert not [one for one in held if one() is not None]
    finally:
        gc.enable()
