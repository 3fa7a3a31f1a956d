"""Each known mistake of an engine, made on purpose: the comparison with `transformers` sees it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from blyan_node.moe import reference as plain
from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.config import LayerConfig, ModelConfig, MoeFeed, Routing
from blyan_node.moe.reference import Reference
from blyan_node.moe.routing import route_sigmoid
from blyan_node.testing.reference import open_reference

pytestmark = pytest.mark.slow  # whole models, many of them

SHOWS = 5e-3  # five times what is promised at most
Config = Callable[[ModelConfig], ModelConfig]
Told = Callable[[Reference, str], float]


@pytest.fixture
def error(directories: dict[str, Path], truths: dict[Path, Tensor], prompt: list[int]) -> Told:
    """The largest difference of a model's logits from a variant's truth, as part of the largest."""

    def told(model: Reference, variant: str) -> float:
        truth = truths[directories[variant]]
        return float((model.forward(prompt)[0] - truth).abs().max() / truth.abs().max())

    return told


def _layers(change: Callable[[LayerConfig], LayerConfig]) -> Config:
    return lambda config: dataclasses.replace(config, layers=tuple(map(change, config.layers)))


def _attentions(change: Callable[[Any], Any]) -> Config:
    return _layers(lambda layer: dataclasses.replace(layer, attention=change(layer.attention)))


def _attention(**changes: Any) -> Config:
    return _attentions(lambda attention: dataclasses.replace(attention, **changes))


def _window(change: Callable[[int | None], int | None]) -> Config:
    return _attentions(lambda a: dataclasses.replace(a, window=change(a.window)))


def _by(count: int) -> Config:
    return _window(lambda window: None if window is None else window + count)


def _feed(change: Callable[[MoeFeed], MoeFeed]) -> Config:
    return _layers(
        lambda layer: (
            dataclasses.replace(layer, feed=change(layer.feed))
            if isinstance(layer.feed, MoeFeed)
            else layer
        )
    )


def _routing(**changes: Any) -> Config:
    return _feed(
        lambda feed: dataclasses.replace(feed, routing=dataclasses.replace(feed.routing, **changes))
    )


def _activation(**changes: Any) -> Config:
    return _feed(
        lambda feed: dataclasses.replace(
            feed, activation=dataclasses.replace(feed.activation, **changes)
        )
    )


def _rope(**changes: Any) -> Config:
    return lambda config: dataclasses.replace(
        config, rope=dataclasses.replace(config.rope, **changes)
    )


CONFIGURED: dict[str, dict[str, Config]] = {
    "mixtral": {
        "no renormalising": _routing(renormalise=False),
        "window one longer": _by(+1),
        "window one shorter": _by(-1),
        "no window": _attention(window=None),
        "one expert too few": _feed(lambda feed: dataclasses.replace(feed, top_k=1)),
        "another theta": _rope(theta=10_000.0),
    },
    "gpt_oss": {
        "no renormalising": _routing(score="softmax", renormalise=False),
        "window one longer": _by(+1),
        "window one shorter": _by(-1),
        "windows in the other layers": _window(lambda window: None if window else 12),
        "YaRN's attention factor left out": _rope(attention_factor=1.0),
        "YaRN truncated": _rope(truncate=True),
        "YaRN's factor left out": _rope(factor=None),
        "alpha of silu": _activation(alpha=1.0),
        "no clamp": _activation(limit=1e6),
    },
    "deepseek_v3": {
        "no normalising": _routing(renormalise=False),
        "scaling factor ignored": _routing(scaling=1.0),
        "groups not masked": _routing(groups=1, groups_chosen=1),
        "softmax instead of sigmoid": _routing(score="softmax"),
        "no shared experts": _feed(lambda feed: dataclasses.replace(feed, shared_intermediate=0)),
        "the other pairs rotated": _attention(interleaved=False),
        "YaRN's factor left out": _rope(factor=None),
        "YaRN's attention factor left out": _rope(attention_factor=1.0),
        "YaRN's mscale_all_dim left out": _rope(score_factor=1.0),
    },
    "deepseek_v3-odd": {
        "normalising": _routing(renormalise=True),
        "the other pairs rotated": _attention(interleaved=True),
        "the model's eps in the latents' norms": _attention(norm_eps=0.5),
    },
    "qwen3_moe": {
        "no renormalising": _routing(renormalise=False),
        "window one longer": _by(+1),
        "window one shorter": _by(-1),
        "no q/k norm": _attention(qk_norm=None),
        "another theta": _rope(theta=1e6),
    },
    "qwen3_moe-odd": {
        "renormalising": _routing(renormalise=True),
        "YaRN's attention factor left out": _rope(attention_factor=1.0),
        "YaRN's factor left out": _rope(factor=None),
        "no q/k norm": _attention(qk_norm=None),
    },
    "olmoe": {
        "renormalising": _routing(renormalise=True),
        "no clip": _attention(clip=None),
        "no q/k norm": _attention(qk_norm=None),
    },
    "olmoe-odd": {
        "no renormalising": _routing(renormalise=False),
        "no q/k norm": _attention(qk_norm=None),
    },
}


@pytest.mark.parametrize(
    ("variant", "mistake"),
    [(variant, name) for variant, mistakes in CONFIGURED.items() for name in mistakes],
)
def test_a_wrong_configuration_shows(
    directories: dict[str, Path], error: Told, variant: str, mistake: str
) -> None:
    model = open_reference(directories[variant])
    right, model.config = model.config, CONFIGURED[variant][mistake](model.config)
    assert model.config != right
    assert error(model, variant) > SHOWS


class Mistaken:
    """An arithmetic of which one operation is done by `mistake`, which is given the right one."""

    def __init__(self, right: Arithmetic, name: str, mistake: Callable[..., Tensor]) -> None:
        self._right = right
        setattr(self, name, partial(mistake, getattr(right, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._right, name)


Right = Callable[..., Tensor]


def _drop_sinks(attend: Right, *given: Any, sinks: Tensor | None = None, **named: Any) -> Tensor:
    return attend(*given, **named)


def _other_pairs(rotate: Right, *given: Any, interleaved: bool = False) -> Tensor:
    return rotate(*given, interleaved=not interleaved)


def _not_rotated(rotate: Right, x: Tensor, *given: Any, interleaved: bool = False) -> Tensor:
    return x


def _unscaled_norm(norm: Right, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm(x, torch.ones_like(weight), eps)


def _corrected_weights(
    arithmetic: Arithmetic, logits: Tensor, top_k: int, routing: Routing, correction: Tensor
) -> tuple[Tensor, Tensor]:
    experts, _ = route_sigmoid(arithmetic, logits, top_k, routing, correction)
    weights = (torch.sigmoid(logits) + correction).gather(1, experts)
    return experts, weights / weights.sum(-1, keepdim=True) * routing.scaling


def _groups_by_their_best(
    arithmetic: Arithmetic, logits: Tensor, top_k: int, routing: Routing, correction: Tensor
) -> tuple[Tensor, Tensor]:
    best = (torch.sigmoid(logits) + correction).view(1, routing.groups, -1).amax(-1)
    left_out = torch.ones(best.shape, dtype=torch.bool)
    left_out.scatter_(1, best.topk(routing.groups_chosen).indices, False)
    masked = left_out.repeat_interleave(logits.shape[1] // routing.groups, dim=1)
    ungrouped = dataclasses.replace(routing, groups=1, groups_chosen=1)
    return route_sigmoid(arithmetic, logits, top_k, ungrouped, correction.where(~masked, -9.0))


@pytest.mark.parametrize(
    ("variant", "name", "mistake"),
    [
        ("mixtral", "rotate", _other_pairs),
        ("mixtral", "rotate", _not_rotated),
        ("mixtral", "rms_norm", _unscaled_norm),
        ("gpt_oss", "attend", _drop_sinks),
        ("gpt_oss", "rotate", _other_pairs),
        ("deepseek_v3", "rotate", _not_rotated),
        ("deepseek_v3", "rms_norm", _unscaled_norm),
        ("qwen3_moe", "rotate", _other_pairs),
        ("olmoe", "rotate", _other_pairs),
    ],
)
def test_a_wrong_step_shows(
    directories: dict[str, Path], error: Told, variant: str, name: str, mistake: Right
) -> None:
    model = open_reference(directories[variant])
    model.arithmetic = Mistaken(model.arithmetic, name, mistake)  # type: ignore[assignment]
    assert error(model, variant) > SHOWS


@pytest.mark.parametrize("mistake", [_corrected_weights, _groups_by_their_best])
def test_a_wrong_choice_shows(
    directories: dict[str, Path],
    error: Told,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[..., object],
) -> None:
    monkeypatch.setattr(plain, "route", mistake)
    assert error(open_reference(directories["deepseek_v3"]), "deepseek_v3") > SHOWS


@pytest.mark.parametrize(
    "variant",
    ["mixtral", "mixtral-fused", "gpt_oss", "qwen3_moe", "qwen3_moe-odd", "olmoe", "deepseek_v3"],
)
def test_gate_and_up_swapped_shows(directories: dict[str, Path], error: Told, variant: str) -> None:
    model = open_reference(directories[variant])
    for name, part in model.parts.items():
        if "expert" in name:
            _swap(part)
    assert error(model, variant) > SHOWS


def _swap(part: dict[str, Tensor]) -> None:
    if "gate" in part:
        part["gate"], part["up"] = part["up"], part["gate"]
    elif "gate_up" in part:
        part["gate_up"] = torch.cat(part["gate_up"].chunk(2)[::-1])
    else:
        both, bias = part["gate_up_interleaved"], part["gate_up_bias"]
        part["gate_up_interleaved"] = both.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        part["gate_up_bias"] = bias.unflatten(0, (-1, 2)).flip(1).flatten()


@pytest.mark.parametrize(
    ("variant", "left_out"),
    [
        ("qwen3_moe-odd", "_bias"),
        ("gpt_oss", "_bias"),
        ("gpt_oss", "bias"),
        ("gpt_oss", "sinks"),
        ("olmoe-odd", "_bias"),
        ("deepseek_v3", "correction"),
        ("deepseek_v3-odd", "_bias"),
    ],
)
def test_a_tensor_left_out_shows(
    directories: dict[str, Path], error: Told, variant: str, left_out: str
) -> None:
    model = open_reference(directories[variant])
    for part in model.parts.values():
        for role in [role for role in part if role.endswith(left_out)]:
            if role != "gate_up_bias":
                del part[role]
    assert error(model, variant) > SHOWS


def test_clipping_before_the_norm_shows(directories: dict[str, Path], error: Told) -> None:
    """OLMoE clips queries and keys after their norm."""
    model = open_reference(directories["olmoe"])
    clip = model.config.layers[0].attention.clip
    norms = {
        id(tensor)
        for part in model.parts.values()
        for role, tensor in part.items()
        if role in ("q_norm", "k_norm")
    }

    def clipped_first(norm: Right, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm(x.clamp(-clip, clip) if id(weight) in norms else x, weight, eps)

    wrong = Mistaken(model.arithmetic, "rms_norm", clipped_first)
    model.arithmetic = wrong  # type: ignore[assignment]
    assert error(model, "olmoe") > SHOWS
