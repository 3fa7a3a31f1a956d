"""The reference against `transformers`, and proof that the comparison sees each known mistake."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe import reference as plain
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import ModelConfig
from blyan_node.moe.numerics import attention_row
from blyan_node.moe.reference import Reference
from blyan_node.testing.truth import greedy, logits_of

PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(48)]
TOLERANCE = 1e-3
Config = Callable[[ModelConfig], ModelConfig]


def _error(model: Reference, truth: Tensor) -> float:
    """The largest difference at any position, relative to the largest logit."""
    logits, _ = model.forward(PROMPT)
    return float((logits - truth).abs().max() / truth.abs().max())


@pytest.fixture(scope="module")
def truths(directories: dict[str, Path]) -> dict[Path, Tensor]:
    return {path: logits_of(path, PROMPT) for path in directories.values()}


def test_logits_at_every_position(directory: Path, truths: dict[Path, Tensor]) -> None:
    checkpoint = Checkpoint.open(directory)
    model = Reference(checkpoint.config, checkpoint.load)
    assert len(PROMPT) > 3 * max((w for w in checkpoint.config.windows if w), default=0)
    assert _error(model, truths[directory]) < TOLERANCE / 10


def test_greedy_tokens(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    tokens = Reference(checkpoint.config, checkpoint.load).generate(PROMPT, 16)
    assert tokens == greedy(directory, PROMPT, 16)
    assert len(set(tokens)) > 4


def _changed(**changes: object) -> Config:
    return lambda config: dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _window(by: int) -> Config:
    return lambda config: dataclasses.replace(
        config, windows=tuple(w if w is None else w + by for w in config.windows)
    )


def _rope(**changes: object) -> Config:
    return lambda config: dataclasses.replace(
        config,
        rope=dataclasses.replace(config.rope, **changes),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("variant", "mistake"),
    [
        ("mixtral", _window(+1)),
        ("mixtral", _window(-1)),
        ("mixtral", _changed(windows=(None,) * 3)),
        ("mixtral", _changed(top_k=1)),
        ("mixtral", _rope(theta=10_000.0)),
        ("gpt_oss", _window(+1)),
        ("gpt_oss", _window(-1)),
        ("gpt_oss", _changed(windows=(None, 12, None))),
        ("gpt_oss", _rope(attention_factor=1.0)),
        ("gpt_oss", _rope(truncate=True)),
        ("gpt_oss", _rope(factor=None)),
        ("gpt_oss", _changed(swiglu_alpha=1.0)),
        ("gpt_oss", _changed(swiglu_limit=1e6)),
    ],
)
def test_a_wrong_configuration_shows(
    directories: dict[str, Path], truths: dict[Path, Tensor], variant: str, mistake: Config
) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    model = Reference(checkpoint.config, checkpoint.load)
    wrong = Reference(mistake(checkpoint.config), checkpoint.load)
    wrong.parts = model.parts
    assert _error(wrong, truths[directories[variant]]) > 5 * TOLERANCE


def _no_renormalising(logits: Tensor, top_k: int, *, over_chosen: bool) -> tuple[Tensor, Tensor]:
    weights, experts = torch.softmax(logits, dim=-1).topk(top_k)
    return experts, weights


def _drop_sinks(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, sinks: Tensor | None
) -> Tensor:
    return attention_row(query, keys, values, scale, None)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(1)


@pytest.mark.parametrize(
    ("variant", "name", "mistake"),
    [
        ("mixtral", "route", _no_renormalising),
        ("mixtral", "rotate", _interleaved),
        ("mixtral", "rotate", lambda x, cos, sin: x),
        ("gpt_oss", "route", _no_renormalising),
        ("gpt_oss", "attention_row", _drop_sinks),
        ("gpt_oss", "rotate", _interleaved),
    ],
)
def test_a_wrong_step_shows(
    directories: dict[str, Path],
    truths: dict[Path, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    name: str,
    mistake: Callable[..., object],
) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    model = Reference(checkpoint.config, checkpoint.load)
    monkeypatch.setattr(plain, name, mistake)
    assert _error(model, truths[directories[variant]]) > 5 * TOLERANCE


@pytest.mark.parametrize("variant", ["mixtral", "gpt_oss"])
def test_gate_and_up_swapped_shows(
    directories: dict[str, Path], truths: dict[Path, Tensor], variant: str
) -> None:
    checkpoint = Checkpoint.open(directories[variant])
    model = Reference(checkpoint.config, checkpoint.load)
    for name, part in model.parts.items():
        if "expert" in name and variant == "mixtral":
            part["w1.weight"], part["w3.weight"] = part["w3.weight"], part["w1.weight"]
        elif "expert" in name:
            for fused in ("gate_up_proj", "gate_up_proj_bias"):
                pairs = part[fused].unflatten(-1, (-1, 2))
                part[fused] = pairs.flip(-1).flatten(-2).contiguous()
    assert _error(model, truths[directories[variant]]) > 5 * TOLERANCE
