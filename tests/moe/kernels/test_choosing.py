"""A row's experts and weights by steps: the bits of `moe.routing`, whatever the logits are."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from blyan_node.moe.config import Routing, Score
from blyan_node.moe.contract import Contract
from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.program import Program
from blyan_node.moe.routing import record, route

ODD = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-42, -1e-42, 3e38, -3e38, 1.0]
DTYPES = [torch.float32, torch.bfloat16]
VALUES = st.one_of(st.sampled_from(ODD), st.floats(-20, 20, width=32))


def _recorded(
    kernels: Kernels, logits: Tensor, top_k: int, routing: Routing, correction: Tensor | None
) -> tuple[Tensor, Tensor]:
    program = Program(kernels)
    with kernels.recorder.lock:
        with program.recording():
            experts, weights = record(program, logits, top_k, routing, correction)
        assert program.walk(0, program.count) is None
        return experts.clone(), weights.clone()


def _same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    """NaN weights may have any sign."""
    (experts, weights), (other, others) = found, expected
    odd = others.isnan()
    return (
        torch.equal(experts, other)
        and torch.equal(weights.isnan(), odd)
        and torch.equal(weights[~odd].view(torch.int32), others[~odd].view(torch.int32))
    )


@given(data=st.data(), score=st.sampled_from(["softmax", "softmax_chosen"]))
def test_softmax(every_kernels: list[Kernels], data: st.DataObject, score: Score) -> None:
    count = data.draw(st.integers(1, 40))
    logits = torch.tensor([data.draw(st.lists(VALUES, min_size=count, max_size=count))])
    top_k, renormalise = data.draw(st.integers(1, count)), data.draw(st.booleans())
    routing = Routing(score, renormalise=renormalise)
    for kernels in every_kernels:
        expected = route(Contract(kernels), logits, top_k, routing)
        assert _same(_recorded(kernels, logits, top_k, routing, None), expected)


@given(data=st.data())
def test_sigmoids_in_groups(every_kernels: list[Kernels], data: st.DataObject) -> None:
    groups, size = data.draw(st.integers(1, 8)), data.draw(st.integers(2, 9))
    chosen, count = data.draw(st.integers(1, groups)), groups * size
    rows = st.lists(VALUES, min_size=count, max_size=count)
    logits, correction = torch.tensor([data.draw(rows)]), None
    if data.draw(st.booleans()):
        correction = torch.tensor(data.draw(rows)).to(data.draw(st.sampled_from(DTYPES)))
    routing = Routing(
        "sigmoid",
        renormalise=data.draw(st.booleans()),
        groups=groups,
        groups_chosen=chosen,
        scaling=data.draw(st.sampled_from([1.0, 2.5, 0.1])),
    )
    top_k = data.draw(st.integers(1, chosen * size))
    for kernels in every_kernels:
        expected = route(Contract(kernels), logits, top_k, routing, correction)
        assert _same(_recorded(kernels, logits, top_k, routing, correction), expected)
