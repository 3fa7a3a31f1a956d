"""Recordings: the bits of calls, whoever calls at once, and nothing of the last row in them."""

import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from blyan_node.moe.contract import Steps
from blyan_node.moe.kernels.library import Kernels, load
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.recording import Recording
from blyan_node.moe.kernels.targets import runnable

DEPTH, OUTS = 45, 70


class Network:
    """Something of each kind of kernel that a recording may have."""

    def __init__(self, kernels: Kernels) -> None:
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(OUTS, DEPTH, generator=generator)
        self.kernels, self.calls = kernels, 0
        self.rows = Matrix.of(weight.bfloat16(), biases=weight[:, 0].contiguous())
        self.columns = Matrix.of(weight.t().contiguous().t())
        self.norm = torch.randn(OUTS, generator=generator)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        k = self.kernels
        first = k.linear(x, self.rows)
        gate, up = k.linear(y, self.columns).chunk(2, dim=1)
        normed = k.rms_norm(first, self.norm, 1e-5)
        heads = k.rms_norm(first.view(-1, 7), self.norm[:7].clone(), 1e-3)
        both = k.gpt_oss(normed, 0.7, 1.7)
        return k.add(normed, heads.view(1, -1)), k.add(k.swiglu(gate, up), both)


def _operands(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, DEPTH, generator=generator) for _ in range(2)]


def _same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_row_has_the_bits_that_calls_give(kernels: Kernels) -> None:
    network, made = Network(kernels), None
    for seed in range(5):
        operands = _operands(seed)
        made, found = kernels.recorder.played(made, network, operands)
        assert network.calls == 1 + seed  # once for the recording, and our own below
        assert _same(found, network(*operands))


def test_results_are_the_callers(kernels: Kernels) -> None:
    network, other = Network(kernels), Network(kernels)
    made, first = kernels.recorder.played(None, network, _operands(0))
    kept = [one.clone() for one in first]
    kernels.recorder.played(made, network, _operands(1))
    kernels.recorder.played(None, other, _operands(2))
    assert _same(first, tuple(kept))


def test_threads_that_share_the_work_change_no_bit(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blyan_node.moe.kernels.workers._PRODUCTS_MIN", 1)
    shared = load(target=runnable()[0], threads=3)
    network, alone, made = Network(shared), Network(kernels), None
    for seed in range(3):
        made, found = shared.recorder.played(made, network, _operands(seed))
        assert _same(found, alone(*_operands(seed)))
    assert network.calls == 1
    shared.close()


def test_threads_that_call_at_once_do_not_meet(kernels: Kernels) -> None:
    network, wrong = Network(kernels), []
    made, _ = kernels.recorder.played(None, network, _operands(0))

    def call(seed: int) -> None:
        expected = network(*_operands(seed))
        recording: Recording | None = made
        for _ in range(200):
            recording, found = kernels.recorder.played(recording, network, _operands(seed))
            if not _same(found, expected):
                wrong.append(seed)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(call, range(4)))
    assert not wrong


def test_a_recording_within_another_is_part_of_it(kernels: Kernels) -> None:
    network = Network(kernels)

    def outer(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        inner, results = kernels.recorder.played(None, network, (x, y))
        assert inner is None
        return (kernels.add(*results),) if results[0].shape == results[1].shape else results

    made, _ = kernels.recorder.played(None, outer, _operands(0))
    _, found = kernels.recorder.played(made, outer, _operands(1))
    assert _same(found, network(*_operands(1)))


def test_a_description_outlives_a_call_that_began_before_it(kernels: Kernels) -> None:
    made: list[weakref.ref[Recording]] = []

    def function(x: Tensor) -> tuple[Tensor]:
        if kernels.recorder.active is None and not made:  # the lock is taken: by who describes
            steps.describe(DEPTH)
            assert steps._recording is not None
            made.append(weakref.ref(steps._recording))
        return (kernels.sigmoid(x),)

    steps = Steps(kernels, function)
    with kernels.recorder.lock:
        steps(torch.zeros(1, DEPTH))
    (recording,) = made
    assert recording() is not None and steps.described
