"""What is done between products equals the reference bit for bit, and the mathematics closely."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blyan_node.moe.kernels.library import Kernels
from blyan_node.testing import exact_sums
from blyan_node.testing.exact_sums import Floats

WIDTHS = [1, 7, 8, 16, 31, 33, 64, 100, 291]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3e38, 88.8, -87.5, -103.5, 7.0]


def _rows(width: int, seed: int, rows: int = 5, *, special: bool = True) -> Floats:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((rows, width)) * 6).astype(np.float32)
    if special:
        places = random.integers(0, width, len(SPECIAL))
        for number, (place, value) in enumerate(zip(places, SPECIAL, strict=True)):
            x[number % (rows - 1), place] = value
    return x


def _same(found: Tensor, expected: Floats) -> bool:
    ours = found.contiguous().numpy().view(np.int32)
    return bool((ours == np.ascontiguousarray(expected).view(np.int32)).all())


def _t(x: Floats) -> Tensor:
    return torch.from_numpy(x)


def test_exp_of_the_page_is_exp_for_arrays() -> None:
    text = (Path(__file__).parents[3] / "docs" / "sums.md").read_text()
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (code,) = (one for one in codes if "def exp(" in one)
    page: dict[str, Any] = {}
    exec(code, page)
    x = np.linspace(-104, 89, 4001, dtype=np.float32)
    assert _same(_t(exact_sums.exp(x)), np.array([page["exp"](v) for v in x.tolist()], np.float32))


def test_exp_is_close_everywhere() -> None:
    x = np.random.default_rng(0).uniform(-103, 88.7, 1 << 20).astype(np.float32)
    true = np.exp(x.astype(np.float64))
    off = np.abs(exact_sums.exp(x) - true) / np.spacing(true.astype(np.float32))
    assert off.max() < 1.2
    found = exact_sums.exp(np.array([-math.inf, -104, 0, 88.8, math.inf, math.nan], np.float32))
    assert found[:5].tolist() == [0, 0, 1, math.inf, math.inf]
    assert np.isnan(found[5])


@pytest.mark.parametrize("width", WIDTHS)
def test_rows_equal_the_reference(kernels: Kernels, width: int) -> None:
    x, y = _rows(width, width), _rows(width, width + 1, special=False)
    both = _rows(2 * width, width + 2)
    assert _same(kernels.swiglu(_t(x), _t(y)), exact_sums.swiglu(x, y))
    assert _same(kernels.gpt_oss(_t(both), 7.0, 1.702), exact_sums.gpt_oss(both, 7.0, 1.702))
    expected = exact_sums.sigmoid_of_product(np.float32(1), x)
    assert _same(kernels.sigmoid(_t(x)), expected)
    for rows in (x, y):
        expected = exact_sums.rms_norm(rows, y[0], 1e-5)
        assert _same(kernels.rms_norm(_t(rows), _t(y[0].copy()), 1e-5), expected)
        assert _same(kernels.softmax(_t(rows)), exact_sums.softmax(rows))
    in_place = _t(y.copy())
    kernels.softmax(in_place, in_place)
    assert _same(in_place, exact_sums.softmax(y))


def test_results_are_those_of_torch(kernels: Kernels) -> None:
    """Closely, and NaN and infinity exactly where torch has them."""
    x, y = _t(_rows(60, 1)), _t(_rows(60, 2, special=False))
    both = _t(_rows(120, 3))
    gate, up = both[:, ::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
    pairs: list[tuple[Tensor, Tensor]] = [
        (kernels.swiglu(x, y), F.silu(x) * y),
        (kernels.gpt_oss(both, 7.0, 1.702), (up + 1) * gate * torch.sigmoid(1.702 * gate)),
        (kernels.sigmoid(x), torch.sigmoid(x)),
        (kernels.softmax(x), torch.softmax(x, -1)),
        (kernels.softmax(y), torch.softmax(y, -1)),
        (kernels.rms_norm(y, y[0], 1e-6), F.rms_norm(y, (60,), y[0], 1e-6)),
        (kernels.rms_norm(x, y[0], 1e-6), F.rms_norm(x, (60,), y[0], 1e-6)),
    ]
    for ours, theirs in pairs:
        assert torch.allclose(ours, theirs, rtol=3e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation(kernels: Kernels, interleaved: bool) -> None:
    n, heads = 3, 5
    for half in (1, 5, 8, 32, 33):
        random = np.random.default_rng(half)
        x = random.standard_normal((n, heads, 2 * half)).astype(np.float32)
        cos, sin = random.standard_normal((2, n, half)).astype(np.float32)
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
        c, s = cos[:, None], sin[:, None]
        expected = np.concatenate([a * c - b * s, b * c + a * s], axis=2)
        found = kernels.rotate(_t(x), _t(cos), _t(sin), interleaved=interleaved)
        assert _same(found, expected)
        # Heads first, as a cache has them, from rows with something else in between.
        padded = torch.zeros(n, heads, 2 * half + 3)
        padded[..., : 2 * half] = _t(x)
        into = torch.empty(heads, n, 2 * half).transpose(0, 1)
        given = padded[..., : 2 * half]
        kernels.rotate(given, _t(cos), _t(sin), interleaved=interleaved, out=into)
        assert _same(into.contiguous(), expected)


@pytest.mark.parametrize("seen", [1, 15, 16, 17, 32, 33, 50, 96])
@pytest.mark.parametrize(("heads", "kv", "dim", "value_dim"), [(4, 2, 6, 6), (3, 3, 40, 9)])
def test_attention(
    kernels: Kernels, heads: int, kv: int, dim: int, value_dim: int, seen: int
) -> None:
    random = np.random.default_rng(seen)

    def noise(*shape: int) -> Floats:
        return random.standard_normal(shape).astype(np.float32)

    query = noise(heads, dim)
    keys, values = (noise(kv, seen + 3, size)[:, 1 : seen + 1] for size in (dim, value_dim))
    q, k, v, scale = _t(query), _t(keys), _t(values), dim**-0.5
    for sinks in (None, noise(heads)):
        expected = exact_sums.attend(query, keys, values, scale, sinks)
        given = None if sinks is None else _t(sinks)
        (found,) = kernels.attend(q[None], k, v, scale, sinks=given)
        assert _same(found, expected)
        scores = torch.einsum("hgd,hsd->hgs", q.view(kv, -1, dim), k).reshape(heads, seen) * scale
        if sinks is not None:
            scores = torch.cat([scores, _t(sinks)[:, None]], 1)
        shares = torch.softmax(scores, -1)[:, :seen].view(kv, -1, seen)
        theirs = torch.einsum("hgs,hsd->hgd", shares, v).reshape(heads, value_dim)
        assert torch.allclose(found, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_each_row_sees_what_was_before_it(kernels: Kernels, rows: int, window: int | None) -> None:
    random = np.random.default_rng(rows)
    seen, heads, kv, dim = 50, 6, 2, 10
    query = random.standard_normal((rows, heads, dim)).astype(np.float32)
    keys, values = random.standard_normal((2, kv, seen, dim)).astype(np.float32)
    sinks = random.standard_normal(heads).astype(np.float32)
    found = kernels.attend(_t(query), _t(keys), _t(values), 0.3, window=window, sinks=_t(sinks))
    for row in range(rows):
        last = seen - rows + row + 1
        here = slice(max(0, last - (window or seen)), last)
        expected = exact_sums.attend(query[row], keys[:, here], values[:, here], 0.3, sinks)
        assert _same(found[row], expected), row


def _no_rounding_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sums, "dots", lambda x, w: (x.astype(np.float64) @ w.T).astype("f4"))


def _exp_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_sums, "exp", np.exp)


@pytest.mark.parametrize("breaking", [_no_rounding_of_sums, _exp_of_numpy])
def test_another_rule_is_noticed(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, breaking: Callable[..., None]
) -> None:
    x = _rows(291, 1, special=False)
    found = kernels.softmax(_t(x))
    assert _same(found, exact_sums.softmax(x))
    breaking(monkeypatch)
    assert not _same(found, exact_sums.softmax(x))
