"""Sampling: a function of logits, settings, seed and count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.moe.sampling import Sampler
from protocols.errors import ErrorCode, Refused

LOGITS = torch.tensor([0.0, 3.0, 1.0, 3.0, -2.0])


def _draws(sampler: Sampler, count: int) -> list[int]:
    return [sampler.pick(LOGITS) for _ in range(count)]


def test_greedy_takes_the_smaller_of_equals() -> None:
    assert _draws(Sampler(), 3) == [1, 1, 1]


def test_the_seed_decides_and_nothing_global() -> None:
    first = _draws(Sampler(1.0, 1.0, 7), 50)
    torch.manual_seed(99)
    assert _draws(Sampler(1.0, 1.0, 7), 50) == first
    assert _draws(Sampler(1.0, 1.0, 8), 50) != first
    assert len(set(first)) > 2


def test_it_goes_on_elsewhere() -> None:
    whole = _draws(Sampler(1.0, 0.9, 3), 40)
    assert _draws(Sampler(1.0, 0.9, 3, drawn=25), 15) == whole[25:]


def test_frequencies_follow_the_logits() -> None:
    draws = _draws(Sampler(2.0, 1.0, 11), 20_000)
    expected = torch.softmax(LOGITS.double() / 2.0, dim=0)
    for token, share in enumerate(expected.tolist()):
        assert abs(draws.count(token) / 20_000 - share) < 0.015


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.3, {1}), (0.5, {1, 3}), (0.95, {1, 2, 3}), (1e-9, {1})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]) -> None:
    assert set(_draws(Sampler(1.0, top_p, 5), 3_000)) == allowed


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    temperature=st.floats(0, 100),
    top_p=st.floats(1e-6, 1.0),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_settings_give_a_token(
    logits: list[float], temperature: float, top_p: float, seed: int
) -> None:
    token = Sampler(temperature, top_p, seed).pick(torch.tensor(logits))
    assert 0 <= token < len(logits)


@pytest.mark.parametrize(
    "settings", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0},
                 {"top_p": 1.1}, {"seed": -1}, {"seed": 2**64}],
)  # fmt: skip
def test_wrong_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(Refused, match="expected") as refusal:
        Sampler(**settings)  # type: ignore[arg-type]
    assert refusal.value.code is ErrorCode.BAD_INPUT


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Refused, match="not all finite"):
        Sampler().pick(torch.tensor([1.0, float("nan")]))
