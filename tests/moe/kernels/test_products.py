"""Products equal the reference of docs/sums.md bit for bit, however they are cut up."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from llvmlite import ir

from blyan_node.moe.kernels import compiler, emit, order, registers, tile
from blyan_node.moe.kernels.library import LINEAR, Kernels
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import runnable
from blyan_node.testing.exact_sums import (
    Broken,
    Floats,
    block_dots,
    dots,
    one_nan,
    products,
    whole_dots,
)

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
DEPTHS = [1, 15, 16, 17, 31, 32, 33, 64, 95, 288]
STREAMS = [stream.depth for name in ("float32", "float16") for stream in STORAGES[name].streams]
EDGES = [depth + more for depth in STREAMS if depth < 8192 for more in (0, 1)]


def _page() -> dict[str, Any]:
    """The names that the reference in docs/sums.md defines."""
    text = (Path(__file__).parents[3] / "docs" / "sums.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [*DEPTHS, *EDGES])
def test_every_shape_equals_the_reference(kernels: Kernels, depth: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(depth)
    x = _rows(random, 11, depth)
    w = torch.from_numpy(_rows(random, 13, depth) * np.float32(1e-3)).to(dtype)
    expected = products(x, w.float().numpy())
    for rows in (1, 2, 3, 4, 5, 6, 7, 11):
        for outs in (1, 2, 3, 4, 5, 8, 13):
            found = kernels.linear(torch.from_numpy(x[:rows]), Matrix.of(w[:outs]))
            assert _same(found.numpy(), expected[:rows, :outs]), (rows, outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [*DEPTHS, 128, 130])
def test_by_columns_a_matrix_has_the_bits_that_it_has_by_rows(
    kernels: Kernels, depth: int, dtype: torch.dtype
) -> None:
    random = np.random.default_rng(depth)
    x = torch.from_numpy(_rows(random, 5, depth))
    x[3, ::2], x[4] = 0.0, 1e-30
    for outs in (1, 7, 8, 200, 401):
        weight = torch.from_numpy(_rows(random, outs, depth) * np.float32(1e-3)).to(dtype)
        weight[0, 0], weight[-1] = -0.0, -0.0
        weight[outs // 2] = -1e-30  # of which x[4] makes -0, and padding 0 of that
        by_columns = weight.t().contiguous().t()
        for biases in (None, torch.from_numpy(_rows(random, 1, outs)[0])):
            matrix = Matrix.of(by_columns, biases=biases)
            assert matrix.by_columns or outs == 1 or depth == 1
            expected = kernels.linear(x, Matrix.of(weight, biases=biases))
            found = kernels.linear(x, matrix)
            assert _same(found.numpy(), expected.numpy()), outs
            found.zero_()
            for span in ((0, outs // 3), (outs // 3, outs)):
                kernels.linear(x, matrix, found, span)
            assert _same(found.numpy(), expected.numpy()), outs


BROKEN: list[Broken] = ["order", "tree", "padding", "fused", "partial sums"]


@pytest.mark.parametrize("broken", BROKEN)
def test_another_order_is_noticed(kernels: Kernels, broken: Broken) -> None:
    random = np.random.default_rng(1)
    x, w = _rows(random, 3, 95), _rows(random, 7, 95)
    found = kernels.linear(torch.from_numpy(x), Matrix("float32", w.shape, w)).numpy()
    assert _same(found, dots(x, w))
    assert not _same(found, dots(x, w, broken))


def _tree_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial sums of a register are added to their neighbours instead of the other half."""

    def pick(b: Any, first: Any, second: Any, lanes: Any) -> Any:
        lanes = list(lanes)
        if 1 < len(lanes) < 8 and lanes == list(range(lanes[0], lanes[0] + len(lanes))):
            start = 0 if lanes[0] == 0 else 1
            lanes = [start + 2 * lane for lane in range(len(lanes))]
        return _pick(b, first, second, lanes)

    _pick = emit.pick
    monkeypatch.setattr(emit, "pick", pick)


def _remainder_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "add_remainder", lambda *arguments: None)


def _padding_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The block that depth ends in is not continued with zeros but with what follows."""
    monkeypatch.setattr(registers, "padded", lambda b, start, count, size: start)


def _blocks_of_half_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "PARTIAL_SUMS", 8)


@pytest.mark.parametrize(
    "breaking",
    [
        _tree_of_neighbours,
        _remainder_forgotten,
        _padding_forgotten,
        _blocks_of_half_the_size,
    ],
)
def test_a_broken_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, breaking: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """What compiles is the kernel with one rule broken; its bits are not the reference's."""
    # In a register of sixteen lanes there are no blocks of half the size.
    target = next(one for one in runnable() if one.lanes < order.PARTIAL_SUMS)
    random = np.random.default_rng(3)
    # Memory goes on after both, so that reading too far does no harm.
    x, w = _rows(random, 7, 75)[:5], _rows(random, 11, 75)[:9]
    matrix = Matrix("float32", w.shape, w)
    breaking(monkeypatch)
    module = ir.Module("broken")
    module.triple = llvm.get_process_triple()
    compiler.export(module, tile.product(module, STORAGES["float32"], target))
    machine = compiler.machine(target)
    code = compiler.Code(target, machine.emit_object(compiler.optimise(str(module), machine)))
    found = np.zeros((5, 9), np.float32)
    code.function("call_linear_float32", LINEAR).call(
        matrix.place, x.ctypes.data, 4 * 75, 5, found.ctypes.data, 4 * 9, 0, 9
    )
    assert np.isfinite(found).all()
    assert not _same(found, products(x, w))


# The largest value of a row: below and at the least that is made whole, the greatest and above.
LARGEST = [2.0**-149, 2.0**-100 * (1 - 2.0**-24), 2.0**-100, 2.0**100, 2.0**100 * (1 + 2.0**-23)]


@pytest.mark.parametrize("depth", [1, 16, 45, 576, 2048, 2081, 6144, 65536, 65537])
def test_rows_of_int8_have_the_bits_of_their_rule(kernels: Kernels, depth: int) -> None:
    """Whole numbers where a row can be made so, whatever the rows beside it are."""
    random = np.random.default_rng(depth)
    codes = torch.from_numpy(random.integers(-128, 128, (7, depth), np.int8))
    codes[3] = -128
    scales = torch.from_numpy(_rows(random, 1, 7)[0])
    matrix = Matrix.of(codes, scales=scales)
    x = np.concatenate([_rows(random, 1, depth) for _ in range(9 + len(LARGEST))])
    x[1, -1], x[2, 0], x[3] = np.inf, np.nan, 0.0
    x[4] = np.float32(1.99999988)  # rounds to 2^15, which is one too many
    x[5] = np.float32(-1.99999988)
    for row, largest in zip(x[9:], LARGEST, strict=True):
        row *= np.float32(largest) / np.abs(row).max()
        row[depth // 2] = largest
    given = codes.numpy().astype(np.float32)
    expected = products(x, given, whole=True, scales=scales.numpy())
    for first in range(len(x)):
        for rows in (1, 4, 7):
            found = kernels.linear(torch.from_numpy(x[first : first + rows]), matrix).numpy()
            assert _same(found, expected[first : first + rows]), (first, rows)


def test_the_rule_for_whole_numbers_is_the_one_of_the_page() -> None:
    page, random = _page(), np.random.default_rng(5)
    codes = random.integers(-128, 128, (3, 45), np.int8).astype(np.float32)
    for size in (1e-33, 1e-3, 1.0, 1e29, 1e31):
        x = random.standard_normal((1, 45)).astype(np.float32) * np.float32(size)
        expected = [page["whole_dot"](x[0].tolist(), row.astype(int).tolist()) for row in codes]
        assert _same(whole_dots(x, codes)[0], np.array(expected, np.float32))


# The largest value of a block: zero, below the least power, at it, the greatest and above.
OF_BLOCKS = [0.0, 2.0**-149, 2.0**-100, 2.0**20, 2.0**20 * (1 + 2.0**-23), 1e30]


@pytest.mark.parametrize("depth", [32, 64, 96, 128, 288, 320, 2880, 65536, 65568])
def test_rows_of_mxfp4_have_the_bits_of_their_rule(kernels: Kernels, depth: int) -> None:
    """Whole numbers where a row can be made so, whatever the rows beside it are."""
    random = np.random.default_rng(depth)
    codes = random.integers(0, 256, (7, depth // 2), np.uint8)
    codes[3] = 0xFF  # -6
    scales = random.integers(90, 160, (7, depth // 32), np.uint8)
    matrix = Matrix("mxfp4_whole", (7, depth), codes, block_scales=scales)
    x = np.concatenate([_rows(random, 1, depth) for _ in range(9 + len(OF_BLOCKS))])
    x[1, -1], x[2, 0], x[3] = np.inf, np.nan, 0.0
    x[4] = np.float32(1.99999988)  # rounds to 2^15, which is one too many
    x[5] = np.float32(-1.99999988)
    x[6] *= np.exp(5 * random.standard_normal((depth // 32, 1))).repeat(32, 1).ravel()
    for row, largest in zip(x[9:], OF_BLOCKS, strict=True):
        row[-32:] *= np.float32(largest) / np.abs(row[-32:]).max()
        row[-1] = largest
    given = E2M1[np.stack([codes & 15, codes >> 4], -1).reshape(7, depth)]
    expected = products(x, given, block_scales=scales)
    for first in range(len(x)):
        for rows in (1, 2, 3, 4, 7):
            found = kernels.linear(torch.from_numpy(x[first : first + rows]), matrix).numpy()
            assert _same(found, expected[first : first + rows]), (first, rows)


def test_the_rule_for_blocks_is_the_one_of_the_page() -> None:
    page, random = _page(), np.random.default_rng(6)
    numbers = E2M1[random.integers(0, 16, (3, 160))]
    for wild in (False, True):
        scales = random.integers(0 if wild else 100, 256 if wild else 150, (3, 5)).astype(np.uint8)
        for size in (1e-33, 1e-3, 1.0, 1e4, 1e7, 1e31):
            x = random.standard_normal((1, 160)).astype(np.float32) * np.float32(size)
            pairs = zip(numbers.tolist(), scales.tolist(), strict=True)
            expected = np.array([page["block_dot"](x[0].tolist(), *pair) for pair in pairs])
            found = one_nan(block_dots(x, numbers, scales)[0])
            assert _same(found, one_nan(expected.astype(np.float32)))
