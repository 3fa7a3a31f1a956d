"""Whole models by the kernels, by the written order without them, and by torch."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic, choose
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.contract import Contract
from blyan_node.moe.kernels import library
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.kernels.order import CONTRACT
from blyan_node.moe.kernels.targets import Unsupported, runnable
from blyan_node.moe.numerics import Plain
from blyan_node.moe.profile import profile
from blyan_node.moe.reference import Reference
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine
from blyan_node.testing.exact_arithmetic import Exact
from blyan_node.testing.reference import open_reference
from protocols.errors import Refused

TOLERANCE = 1e-4


def _targets() -> list[str]:
    try:
        return [target.name for target in runnable()]
    except Unsupported:
        return []


KERNELS = pytest.mark.skipif(not _targets(), reason="this processor has no fused multiply-add")


@KERNELS
def test_a_whole_model_has_the_bits_of_the_written_order(
    directory: Path, prompt: list[int]
) -> None:
    """Token by token and all at once: the kernels are never the measure of themselves."""
    checkpoint = Checkpoint.open(directory)
    expected, chosen = Reference(checkpoint.config, checkpoint.load, Exact()).forward(prompt[:9])
    logits, experts = open_reference(directory, best()).forward(prompt[:9])
    assert torch.equal(logits, expected)
    assert all(torch.equal(experts[layer], chosen[layer]) for layer in chosen)
    engine, composed = Engine(checkpoint.config, checkpoint.load, best()), random.Random(1)
    for cuts in ([9], [1] * 9, [5, 1, 1, 2]):
        cache, at, got = engine.trunk.new_cache(), 0, []
        for count in cuts:
            got += engine.forward([(cache, prompt[at : at + count])], composed)
            at += count
        assert torch.equal(torch.cat(got), expected)


@pytest.mark.slow
@KERNELS
@pytest.mark.parametrize("name", _targets())
@pytest.mark.parametrize("threads", [1, 3])
def test_targets_and_threads_change_no_bit(
    directory: Path, prompt: list[int], name: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blyan_node.moe.kernels.workers._PRODUCTS_MIN", 1)
    target = next(one for one in runnable() if one.name == name)
    kernels = library.load(user_folder(), target, threads)
    checkpoint = Checkpoint.open(directory)
    expected, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(prompt)
    engine = Engine(checkpoint.config, checkpoint.load, Contract(kernels))
    cache, composed = engine.trunk.new_cache(), random.Random(2)
    got = [engine.forward([(cache, ids)], composed)[0] for ids in (prompt[:31], prompt[31:47])]
    got += engine.forward([(cache, prompt[47:])], composed)
    assert torch.equal(torch.cat(got), expected)
    kernels.close()


def test_torch_agrees_with_transformers_and_with_its_own_reference(
    directory: Path, truths: dict[Path, Tensor], prompt: list[int]
) -> None:
    """The arithmetic of machines without kernels: other bits, the same model."""
    truth, rules = truths[directory], choose("torch")
    logits, _ = open_reference(directory, rules).forward(prompt)
    assert (logits - truth).abs().max() < TOLERANCE * truth.abs().max()
    checkpoint = Checkpoint.open(directory)
    engine, composed = Engine(checkpoint.config, checkpoint.load, rules), random.Random(4)
    cache = engine.trunk.new_cache()
    got = [engine.forward([(cache, ids)], composed)[0] for ids in (prompt[:40], prompt[40:])]
    assert torch.equal(torch.cat(got), logits)


@KERNELS
def test_the_best_is_chosen_and_named(caplog: pytest.LogCaptureFixture) -> None:
    assert str(choose("auto", folder=user_folder())) == f"the {_targets()[0]} kernels"
    names = {choose(name, folder=user_folder()).name for name in _targets()}  # type: ignore[arg-type]
    assert names == {CONTRACT} and not caplog.records
    assert profile(CONTRACT).startswith(f"cpu-{CONTRACT}-")


def _no_kernels() -> list[object]:
    raise Unsupported("this processor has no fma")


def test_without_a_fused_multiply_add_torch_computes_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("blyan_node.moe.arithmetic.runnable", _no_kernels)
    rules: Arithmetic = choose("auto")
    assert isinstance(rules, Plain) and "torch" in profile(rules.name)
    assert "this processor has no fma" in caplog.text
    with pytest.raises(Refused, match="the avx2 kernels do not run"):
        choose("avx2")


@KERNELS
def test_a_target_of_other_processors_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    only = [target for target in runnable() if target.name == "fma"]
    monkeypatch.setattr("blyan_node.moe.arithmetic.runnable", lambda: only)
    assert str(choose("auto", folder=user_folder())) == "the fma kernels"
    with pytest.raises(Refused, match="this processor runs fma"):
        choose("avx512")
