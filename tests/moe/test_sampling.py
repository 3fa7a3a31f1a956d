"""Sampling: a function of logits, settings, seed and count, step by step that of transformers."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blyan_node.moe import sampling
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.generation_config import FILE, check_generation, default_sampling, stop_ids
from blyan_node.moe.sampling import GREEDY, Sampler, Sampling, kept
from blyan_node.testing.checkpoints import make_checkpoint
from protocols.errors import ErrorCode, Refused

LOGITS = torch.tensor([0.0, 3.0, 1.0, 3.0, -2.0])
VOCAB = 200

SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, VOCAB + 5),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.2, 5)),
)


def draws(sampler: Sampler, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    return [sampler.pick(logits) for _ in range(count)]


def theirs(values: torch.Tensor, seen: Sequence[int], s: Sampling) -> torch.Tensor:
    """The probabilities [vocab] that transformers draws from, its steps in its order."""
    ids, scores = torch.tensor([list(seen)], dtype=torch.int64), values[None]
    steps: list[Any] = [RepetitionPenaltyLogitsProcessor(s.repetition_penalty)]
    steps.append(TemperatureLogitsWarper(s.temperature))
    steps += [TopKLogitsWarper(s.top_k)] if s.top_k else []
    steps += [TopPLogitsWarper(s.top_p)] if s.top_p < 1 else []
    steps += [MinPLogitsWarper(s.min_p)] if s.min_p else []
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, dim=-1)[0]


def ours(values: torch.Tensor, seen: Sequence[int], s: Sampling) -> torch.Tensor:
    """The probabilities [vocab] that a sampler draws from, read out of its own steps."""
    sampler = Sampler(s)
    sampler.see(seen)
    copy = values.numpy().astype(np.float64)
    sampler._penalise(copy)
    ids, weights = kept(copy, s)
    out = torch.zeros(len(values), dtype=torch.float64)
    out[torch.from_numpy(ids)] = torch.from_numpy(weights / weights.sum())
    return out


def some_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)).double() * 4


@given(st.integers(0, 2**31), st.lists(st.integers(0, VOCAB - 1), max_size=60), SETTINGS)
def test_probabilities_are_those_of_transformers(seed: int, seen: list[int], s: Sampling) -> None:
    values = some_logits(seed)
    expected = theirs(values, seen or [0], s)
    assert torch.allclose(ours(values, seen or [0], s), expected, atol=1e-9)


@pytest.mark.parametrize(
    "mistake",
    [
        {"temperature": 1.0}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0},
        {"repetition_penalty": 1.0},
    ],
)  # fmt: skip
def test_a_step_that_is_left_out_shows(mistake: dict[str, Any]) -> None:
    """That the test above can fail, for each of its settings."""
    base = {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    with_it = {"top_k": 7, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.5}
    (name,) = mistake
    settings = Sampling(**{**base, **{k: v for k, v in with_it.items() if k == name}})
    values = some_logits(3)
    seen = [int(i) for i in values.topk(3).indices]
    wrong = Sampling(**{**base, **{name: mistake[name]}})
    difference = (ours(values, seen, wrong) - theirs(values, seen, settings)).abs().max()
    assert difference > 1e-3


def test_the_order_of_the_steps_shows() -> None:
    """top-p after top-k keeps more than before it; the penalty comes before the temperature."""
    values = torch.tensor([2.0, 1.9, 1.8, 1.7, 1.6, -9.0]).double()
    s = Sampling(1.0, top_k=3, top_p=0.5)
    assert (ours(values, [5], s) > 0).tolist() == (theirs(values, [5], s) > 0).tolist()
    alone = (ours(values, [5], Sampling(1.0, top_p=0.5)) > 0).sum()
    assert (ours(values, [5], s) > 0).sum() == 2 < alone


def test_equal_logits_at_the_edge_of_top_k_are_all_kept() -> None:
    values = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]).double()
    s = Sampling(1.0, top_k=2)
    assert ours(values, [0], s).count_nonzero() == theirs(values, [0], s).count_nonzero() == 3


def test_greedy_takes_the_smaller_of_equals() -> None:
    assert draws(Sampler(), 3) == [1, 1, 1]


def test_greedy_with_a_penalty_goes_on_to_others() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    sampler.see([1])
    assert draws(sampler, 3) == [3, 1, 1]
    negative = Sampler(Sampling(repetition_penalty=3.0))
    assert draws(negative, 2, torch.tensor([-2.0, -3.0])) == [0, 1]


def test_tokens_of_the_prompt_that_the_model_has_not_are_no_error() -> None:
    sampler = Sampler(Sampling(repetition_penalty=2.0))
    sampler.see([10_000])
    assert draws(sampler, 1) == [1]


def test_the_seed_decides_and_nothing_global() -> None:
    hot = Sampling(1.0)
    first = draws(Sampler(hot, 7), 50)
    torch.manual_seed(99)
    assert draws(Sampler(hot, 7), 50) == first
    assert draws(Sampler(hot, 8), 50) != first
    assert len(set(first)) > 2


def test_it_goes_on_elsewhere() -> None:
    settings = Sampling(1.0, top_p=0.9, repetition_penalty=1.3)
    whole = draws(Sampler(settings, 3), 40)
    other = Sampler(settings, 3, drawn=25)
    other.see(whole[:25])
    assert draws(other, 15) == whole[25:]


def test_frequencies_follow_the_logits() -> None:
    drawn = draws(Sampler(Sampling(2.0), 11), 20_000)
    expected = torch.softmax(LOGITS.double() / 2.0, dim=0)
    for token, share in enumerate(expected.tolist()):
        assert abs(drawn.count(token) / 20_000 - share) < 0.015


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_p": 0.3}, {1}), ({"top_p": 0.5}, {1, 3}), ({"top_p": 0.95}, {1, 2, 3}),
        ({"top_p": 1e-9}, {1}), ({"top_k": 1}, {1, 3}), ({"top_k": 3}, {1, 2, 3}),
        ({"min_p": 1.0}, {1, 3}), ({"min_p": 0.1}, {1, 2, 3}), ({"top_k": 99}, {0, 1, 2, 3, 4}),
    ],
)  # fmt: skip
def test_what_may_be_drawn(settings: dict[str, Any], allowed: set[int]) -> None:
    assert set(draws(Sampler(Sampling(1.0, **settings), 5), 3_000)) == allowed


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    s=st.builds(
        Sampling,
        temperature=st.floats(0, 100),
        top_k=st.integers(0, 50),
        top_p=st.floats(1e-6, 1.0),
        min_p=st.floats(0, 1),
        repetition_penalty=st.floats(1e-3, 100),
    ),
    seed=st.integers(0, 2**64 - 1),
)
def test_any_settings_give_a_token(logits: list[float], s: Sampling, seed: int) -> None:
    sampler = Sampler(s, seed)
    for _ in range(2):
        assert 0 <= sampler.pick(torch.tensor(logits)) < len(logits)


@given(st.lists(st.floats(-1e6, 0), min_size=1, max_size=50))
def test_the_exponential_is_right(values: list[float]) -> None:
    x = np.array(values)
    assert np.allclose(sampling._exp(x), np.exp(x), rtol=1e-15, atol=5e-324)


def test_the_exponential_has_these_bits() -> None:
    """Of these operations on any machine: what a library's exponential does not promise."""
    bits = sampling._exp(np.array([-0.1, -1.0, -5.3, -50.0, -700.5])).tobytes().hex()
    assert bits == EXPONENTIALS


EXPONENTIALS = "3a2bd5996df4ec3f38ef2c36568bd73fb1895cc91072743f3f087e547d256d3b02ca685c47ffc400"


@pytest.mark.parametrize(
    "settings", [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": 101.0},
                 {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5}, {"min_p": -0.1},
                 {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": 101.0}],
)  # fmt: skip
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(Refused, match=f"{name}.*expected") as refusal:
        Sampling(**settings)
    assert refusal.value.code is ErrorCode.BAD_INPUT


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_wrong_seeds_are_refused(seed: int) -> None:
    with pytest.raises(Refused, match="expected"):
        Sampler(seed=seed)


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Refused, match="not all finite"):
        Sampler().pick(torch.tensor([1.0, float("nan")]))


def described(**fields: Any) -> dict[str, bytes]:
    return {FILE: json.dumps(fields).encode()}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, GREEDY),
        ({"temperature": 0.6, "top_k": 20}, GREEDY),
        ({"do_sample": False, "temperature": 0.6}, GREEDY),
        ({"do_sample": None}, GREEDY),
        ({"do_sample": True}, Sampling(1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95},
         Sampling(0.6, 20, 0.95)),
        ({"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.05},
         Sampling(1.0, min_p=0.05, repetition_penalty=1.05)),
        ({"do_sample": True, "temperature": 1, "top_k": None}, Sampling(1.0)),
        ({"repetition_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
        ({"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [],
          "max_length": 20, "guidance_scale": None}, GREEDY),
    ],
)  # fmt: skip
def test_what_a_model_says_of_itself(fields: dict[str, Any], expected: Sampling) -> None:
    assert default_sampling(described(**fields)) == expected


def test_a_model_that_says_nothing_is_greedy() -> None:
    assert default_sampling({}) == GREEDY
    saved = GenerationConfig(eos_token_id=5).to_json_string(use_diff=False).encode()
    assert default_sampling({FILE: saved}) == GREEDY
    assert stop_ids({FILE: saved}) == {5}


@pytest.mark.parametrize(
    "fields",
    [
        {"do_sample": "yes"}, {"do_sample": 1}, {"temperature": "hot"}, {"temperature": -1},
        {"temperature": True}, {"top_k": -1}, {"top_k": 2.5}, {"top_p": 0}, {"top_p": 1.5},
        {"min_p": 2}, {"repetition_penalty": 0}, {"num_beams": 4}, {"typical_p": 0.5},
        {"no_repeat_ngram_size": 3}, {"suppress_tokens": [1]}, {"stop_strings": ["x"]},
        {"sequence_bias": {"1": 2}}, {"min_new_tokens": 5},
    ],
)  # fmt: skip
def test_what_a_model_says_wrongly_is_refused_by_name(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(Refused, match=f"{FILE}: {name} is") as refusal:
        default_sampling(described(**fields))
    assert refusal.value.code is ErrorCode.BAD_MODEL


def test_it_is_refused_before_anything_is_published(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "m")
    (path / FILE).write_text('{"do_sample": true, "top_p": 7}')
    with pytest.raises(Refused, match=f"{FILE}: top_p is 7"):
        Checkpoint.open(path)
    (path / FILE).write_text('{"eos_token_id": "end"}')
    with pytest.raises(Refused, match="eos_token_id"):
        Checkpoint.open(path)


def test_broken_files_have_one_error() -> None:
    rng = random.Random(5)
    good = json.dumps({
        "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1,
        "repetition_penalty": 1.1, "eos_token_id": [1, 2], "num_beams": 1, "typical_p": 1.0,
    }).encode()  # fmt: skip
    read = 0
    for _ in range(10_000):
        broken = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(len(broken))] = rng.choice(
                b'0123456789.-+eE"{}[]:,truefalsn\\\xff'
            )
        try:
            check_generation({FILE: bytes(broken)})
        except Refused as refused:
            assert refused.code is ErrorCode.BAD_MODEL
        else:
            read += 1
    assert 0 < read < 10_000
