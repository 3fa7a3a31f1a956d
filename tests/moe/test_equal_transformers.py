"""The reference against `transformers`, and proof that the comparison sees each known mistake."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe import reference as plain
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import LayerConfig, ModelConfig
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
    windows = [layer.attention.window or 0 for layer in checkpoint.config.layers]
    assert len(PROMPT) > 3 * max(windows)
    assert _error(model, truths[directory]) < TOLERANCE / 10


def test_greedy_tokens(directory: Path) -> None:
    checkpoint = Checkpoint.open(directory)
    tokens = Reference(checkpoint.config, checkpoint.load).generate(PROMPT, 16)
    assert tokens == greedy(directory, PROMPT, 16)
    assert len(set(tokens)) > 4


def _layers(change: Callable[[LayerConfig], LayerConfig]) -> Config:
    return lambda config: dataclasses.replace(config, layers=tuple(map(change, config.layers)))


def _attention(**changes: object) -> Config:
    return _layers(
        lambda layer: dataclasses.replace(
            layer, attention=dataclasses.replace(layer.attention, **changes)
        )
    )


def _feed(**changes: object) -> Config:
    return _layers(
        lambda layer: dataclasses.replace(layer, feed=dataclasses.replace(layer.feed, **changes))
    )


def _activation(**changes: object) -> Config:
    def change(layer: LayerConfig) -> LayerConfig:
        activation = dataclasses.replace(layer.feed.activation, **changes)
        return dataclasses.replace(
            layer, feed=dataclasses.replace(layer.feed, activation=activation)
        )

    return _layers(change)


def _windows(change: Callable[[int | None], int | None]) -> Config:
    def changed(layer: LayerConfig) -> LayerConfig:
        window = change(layer.attention.window)
        return dataclasses.replace(
            layer, attention=dataclasses.replace(layer.attention, window=window)
        )

    return _layers(changed)


def _window(by: int) -> Config:
    return _windows(lambda window: None if window is None else window + by)


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
        ("mixtral", _attention(window=None)),
        ("mixtral", _feed(top_k=1)),
        ("mixtral", _rope(theta=10_000.0)),
        ("gpt_oss", _window(+1)),
        ("gpt_oss", _window(-1)),
        ("gpt_oss", _windows(lambda window: None if window else 12)),
        ("gpt_oss", _rope(attention_factor=1.0)),
        ("gpt_oss", _rope(truncate=True)),
        ("gpt_oss", _rope(factor=None)),
        ("gpt_oss", _activation(alpha=1.0)),
        ("gpt_oss", _activation(limit=1e6)),
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


def _no_renormalising(logits: Tensor, top_k: int, **_: bool) -> tuple[Tensor, Tensor]:
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
        if "expert" in name and "gate" in part:
            part["gate"], part["up"] = part["up"], part["gate"]
        elif "expert" in name:
            both, bias = part["gate_up_interleaved"], part["gate_up_bias"]
            part["gate_up_interleaved"] = both.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
            part["gate_up_bias"] = bias.unflatten(0, (-1, 2)).flip(1).flatten()
    assert _error(model, truths[directories[variant]]) > 5 * TOLERANCE
