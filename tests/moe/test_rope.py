"""Angles: the bits of docs/sums.md, the values of a library, and whole tables in any pieces."""

import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blyan_node.moe import rope
from blyan_node.moe.config import Rope
from blyan_node.moe.rope import Floats, RopeTable, cos_sin, inverse_frequencies, natural_log

PAGE = Path(__file__).parents[2] / "docs" / "sums.md"


@pytest.fixture(scope="module")
def plain() -> Callable[[float], tuple[float, float]]:
    """`cos_sin` as the page has it."""
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
    return names["cos_sin"]  # type: ignore[no-any-return]


def _angles(count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    random = np.random.default_rng(1)
    sizes = 10.0 ** random.uniform(-8, 6, count)
    corners = [0.0, math.pi / 4, math.pi / 2, math.pi, 3 * math.pi / 4, 1e6, 131072.0, 1e-40]
    return np.concatenate([sizes, corners]).astype(np.float32).astype(np.float64)


def _differing(plain: Callable[[float], tuple[float, float]]) -> int:
    angles = _angles(20_000)
    expected = np.array([plain(angle) for angle in angles.tolist()]).T
    found = np.array(cos_sin(angles))
    return int((found.view(np.int64) != expected.view(np.int64)).sum())


def test_the_bits_are_those_of_the_page(plain: Callable[[float], tuple[float, float]]) -> None:
    assert _differing(plain) == 0


@pytest.mark.parametrize("name", ["_HALF_PI", "_SIN", "_COS"])
def test_another_constant_is_noticed(
    plain: Callable[[float], tuple[float, float]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(rope, name, list(getattr(rope, name))[:-1])
    assert _differing(plain) > 100


def test_the_values_are_those_of_the_library() -> None:
    angles = _angles(20_000)
    for ours, theirs in zip(cos_sin(angles), (np.cos(angles), np.sin(angles)), strict=True):
        assert np.abs(ours - theirs).max() < 2.0**-50


@pytest.mark.parametrize("dim", [6, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 150_000.0, 1e6])
def test_tables_are_those_of_torch_but_for_rounding(theta: float, dim: int) -> None:
    powers = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    found = inverse_frequencies(Rope(theta), dim)
    assert torch.allclose(found, 1.0 / powers, rtol=3e-7)
    cos, sin = RopeTable(Rope(theta, attention_factor=1.25), dim).rows(0, 2000)
    angles = torch.arange(2000, dtype=torch.float32)[:, None] * found
    assert torch.allclose(cos, 1.25 * angles.cos(), atol=3e-7)
    assert torch.allclose(sin, 1.25 * angles.sin(), atol=3e-7)


def test_rows_are_the_same_in_any_pieces() -> None:
    table, other = (RopeTable(Rope(10_000.0), 8) for _ in range(2))
    whole = table.rows(500, 1600)
    pieces = [other.rows(a, b) for a, b in ((500, 501), (501, 512), (512, 1030), (1030, 1600))]
    for one, parts in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(one, torch.cat(parts)) and one.shape == (1100, 4)


def test_logarithms_are_the_nearest() -> None:
    for value in (1e-3, 0.5, 2.0, 8.0, 40.0, 150_000.0):
        assert abs(natural_log(value) - math.log(value)) <= math.ulp(math.log(value))
    assert natural_log(1.0) == 0.0


def test_threads_that_come_to_a_piece_at_once_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's steps have its address and nothing more: it must not be put in another's place."""
    made, both = rope.cos_sin, threading.Barrier(2, timeout=10)

    def together(angles: Floats) -> tuple[Floats, Floats]:
        both.wait()
        return made(angles)

    monkeypatch.setattr(rope, "cos_sin", together)
    table = RopeTable(Rope(10_000.0), 8)
    with ThreadPoolExecutor(2) as pool:
        places = list(pool.map(lambda _: table.rows(3, 4)[0].data_ptr(), range(2)))
    assert places == [table.rows(3, 4)[0].data_ptr()] * 2
