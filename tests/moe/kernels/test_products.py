"""Products equal the reference of docs/sums.md bit for bit, however they are cut up."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.testing.exact_sums import Broken, Floats, dots, products

DEPTHS = [1, 15, 16, 17, 31, 32, 33, 64, 95, 288]


def _page() -> dict[str, Any]:
    """The names that the reference in docs/sums.md defines."""
    text = (Path(__file__).parents[3] / "docs" / "sums.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def _same(a: Floats, b: Floats) -> bool:
    return bool((np.ascontiguousarray(a).view(np.int32) == b.view(np.int32)).all())


def _rows(random: np.random.Generator, rows: int, depth: int) -> Floats:
    """Rows of very different size, so that a lost or doubled rounding shows."""
    size = np.exp(4 * random.standard_normal((rows, 1)))
    return (random.standard_normal((rows, depth)) * size).astype(np.float32)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_reference_for_arrays_is_the_one_of_the_page(depth: int) -> None:
    random, page = np.random.default_rng(depth), _page()
    x, w = _rows(random, 3, depth), _rows(random, 4, depth)
    scales, biases = _rows(random, 2, 4)
    expected = [
        [
            page["output"](a, *pair)
            for pair in zip(w.tolist(), [256.0] * 4, scales, biases, strict=True)
        ]
        for a in x.tolist()
    ]
    found = products(x, w, unit=256.0, scales=scales, biases=biases)
    assert _same(found, np.array(expected, np.float32))


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_shape_equals_the_reference(kernels: Kernels, depth: int) -> None:
    random = np.random.default_rng(depth)
    x, w = _rows(random, 11, depth), _rows(random, 13, depth)
    expected = products(x, w)
    for rows in (1, 2, 3, 4, 5, 6, 7, 11):
        for outs in (1, 2, 3, 4, 5, 8, 13):
            matrix = Matrix("float32", (outs, depth), torch.from_numpy(w[:outs]))
            found = kernels.linear(torch.from_numpy(x[:rows]), matrix)
            assert _same(found.numpy(), expected[:rows, :outs]), (rows, outs)


BROKEN: list[Broken] = ["order", "tree", "padding", "fused", "partial sums"]


@pytest.mark.parametrize("broken", BROKEN)
def test_another_order_is_noticed(kernels: Kernels, broken: Broken) -> None:
    random = np.random.default_rng(1)
    x, w = _rows(random, 3, 95), _rows(random, 7, 95)
    found = kernels.linear(torch.from_numpy(x), Matrix("float32", w.shape, w)).numpy()
    assert _same(found, dots(x, w))
    assert not _same(found, dots(x, w, broken))
