"""Every storage gives the bits of its exact values: specials, tails, addresses, compositions."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.testing.exact_sums import Floats, products

Bytes = NDArray[np.uint8]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass
class Case:
    """A matrix in one storage and the values that it stands for (FP8: a 256th of them)."""

    matrix: Matrix
    values: Floats
    scales: Floats
    biases: Floats
    rule: dict[str, Any]  # of their products

    def expected(self, x: Floats) -> Floats:
        return products(x, self.values, scales=self.scales, biases=self.biases, **self.rule)

    def only(self, outs: NDArray[np.int64]) -> None:
        """Expects those outputs and no others."""
        self.values, self.scales, self.biases = (
            of_all[outs] for of_all in (self.values, self.scales, self.biases)
        )
        if "block_scales" in self.rule:
            self.rule["block_scales"] = self.rule["block_scales"][outs]


def _float_values(kind: torch.dtype) -> Callable[[Bytes, Bytes], Floats]:
    def values(raw: Bytes, scales: Bytes) -> Floats:
        return torch.from_numpy(raw).view(kind).float().numpy()

    return values


def _mxfp4_values(raw: Bytes, scales: Bytes) -> Floats:
    codes = np.stack([raw & 15, raw >> 4], -1).reshape(raw.shape[0], -1)
    with np.errstate(all="ignore"):
        powers = np.ldexp(1.0, scales.astype(int) - 127).astype(np.float32)
        powers[scales == 255] = np.float32("nan")
        return E2M1[codes] * np.repeat(powers, 32, 1)


def _fp8_values(raw: Bytes, scales: Bytes) -> Floats:
    return torch.from_numpy(raw).view(torch.float8_e4m3fn).float().numpy() / np.float32(256)


def _fp8_block_values(raw: Bytes, scales: Bytes) -> Floats:
    numbers = torch.from_numpy(raw).view(torch.float8_e4m3fn).float().numpy()
    spread = scales.view(np.float32).repeat(128, 0).repeat(128, 1)
    with np.errstate(all="ignore"):
        return numbers * spread[: raw.shape[0], : raw.shape[1]]


VALUES: dict[str, Callable[[Bytes, Bytes], Floats]] = {
    "float32": _float_values(torch.float32),
    "bfloat16": _float_values(torch.bfloat16),
    "float16": _float_values(torch.float16),
    "int8": lambda raw, scales: raw.view(np.int8).astype(np.float32),
    "fp8": _fp8_values,
    "fp8_blocks": _fp8_block_values,
    "mxfp4": _mxfp4_values,
    "mxfp4_whole": _mxfp4_values,
}


def _exact(name: str, raw: Bytes, scales: Bytes) -> tuple[Floats, dict[str, Any]]:
    """What `products` takes of a storage: values, and their rule."""
    rule: dict[str, Any] = {"unit": STORAGES[name].unit, "whole": name == "int8"}
    if name == "mxfp4_whole":
        return _mxfp4_values(raw, np.full_like(scales, 127)), rule | {"block_scales": scales}
    return VALUES[name](raw, scales), rule


def _block_scales(
    name: str, outs: int, depth: int, random: np.random.Generator, *, wild: bool
) -> Bytes | None:
    """Random scales as they lie in memory, None for a storage without."""
    grid = STORAGES[name].grid
    if grid is None:
        return None
    shape = grid.shape(outs, depth)
    if grid.size == 1:
        return random.integers(0, 256, shape, np.uint8) if wild else random.integers(
            100, 150, shape, np.uint8
        )  # fmt: skip
    size = np.exp2(random.integers(-140, 100, shape) if wild else random.integers(-9, 9, shape))
    return (size * random.standard_normal(shape)).astype(np.float32).view(np.uint8)


def _case(name: str, outs: int, depth: int, seed: int, *, every_code: bool) -> Case:
    """Random bytes: every code of the storage, or those of tame numbers."""
    random = np.random.default_rng(seed)
    storage = STORAGES[name]
    raw = random.integers(0, 256, (outs, storage.bytes(depth)), np.uint8)
    scales = _block_scales(name, outs, depth, random, wild=every_code)
    if not every_code:
        tame = torch.randn(outs, depth, generator=torch.Generator().manual_seed(seed))
        if name.startswith("fp8"):
            raw = tame.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        elif storage.bits >= 16:
            raw = tame.to(getattr(torch, name)).view(torch.uint8).numpy()
    channel = random.standard_normal((2, outs)).astype(np.float32)
    matrix = Matrix(
        name,
        (outs, depth),
        raw,
        block_scales=scales,
        scales=channel[0],
        biases=channel[1],
    )
    values, rule = _exact(name, raw, raw if scales is None else scales)
    return Case(matrix, values, channel[0], channel[1], rule)


def _x(rows: int, depth: int, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    size = np.exp(4 * random.standard_normal((rows, 1)))
    return (random.standard_normal((rows, depth)) * size).astype(np.float32)


def _differing(a: Floats, b: Floats) -> int:
    return int((np.ascontiguousarray(a).view(np.int32) != b.view(np.int32)).sum())


@pytest.mark.parametrize("every_code", [False, True])
@pytest.mark.parametrize("name", STORAGES)
def test_values_and_sums(kernels: Kernels, name: str, every_code: bool) -> None:
    for depth in (32, 64, 96, 192, 288, 320) if name.startswith("mxfp4") else (1, 31, 33, 64, 271):
        case = _case(name, 9, depth, depth, every_code=every_code)
        x = _x(7, depth, depth)
        expected = case.expected(x)
        for rows in range(1, 8):
            found = kernels.linear(torch.from_numpy(x[:rows]), case.matrix).numpy()
            assert _differing(found, expected[:rows]) == 0, (depth, rows)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "mxfp4_whole", "int8", "bfloat16", "float16"])
def test_every_code_alone(kernels: Kernels, name: str) -> None:
    """Each code, with each scale byte of mxfp4, once: y = 1 · w."""
    storage, packed = STORAGES[name], name.startswith("mxfp4")
    codes = np.arange(
        1 << max(8, storage.bits), dtype=np.uint16 if storage.bits == 16 else np.uint8
    )
    if packed:
        scales = np.arange(256, dtype=np.uint8)[:, None]
        raw = np.zeros((256, 16), np.uint8)
        raw[:, 0] = 0x10
        places = range(16)
    else:
        raw, scales, places = codes[:, None], np.zeros((codes.size, 0), np.uint8), range(1)
    for code in places:
        if packed:
            raw[:, 3] = code
        depth = 32 if packed else 1
        x = np.zeros((1, depth), np.float32)
        x[0, 6 if packed else 0] = 1
        matrix = Matrix(
            name, (len(raw), depth), raw.copy(), block_scales=scales if packed else None
        )
        values, rule = _exact(name, raw.view(np.uint8), scales)
        expected = products(x, values, **rule)
        assert _differing(kernels.linear(torch.from_numpy(x), matrix).numpy(), expected) == 0


@pytest.mark.parametrize("name", STORAGES)
def test_nan_and_infinity_are_as_in_torch(kernels: Kernels, name: str) -> None:
    infinity = {"float32": [0, 0, 0x80, 0x7F], "bfloat16": [0x80, 0x7F], "float16": [0, 0x7C]}
    case = _case(name, 16, 64, 3, every_code=False)
    raw, scales = case.matrix._buffers[:2]
    if name in infinity:
        size = len(infinity[name])
        raw[3, 5 * size : 6 * size] = infinity[name]
        raw[4, 9 * size : 10 * size] = 0xFF  # NaN
    elif name.startswith("fp8"):
        raw[3, 5], raw[4, 9] = 0x7F, 0xFF
    elif name.startswith("mxfp4"):
        scales[3, 1] = 255
    case.values = VALUES[name](raw, scales)
    x = _x(4, 64, 4)
    x[1, 7], x[2, 7], x[3, 9] = np.inf, -np.inf, np.nan
    unit = np.float32(case.matrix.storage.unit)
    weight = torch.from_numpy(case.values * unit).double()
    theirs = (torch.from_numpy(x).double() @ weight.T).float().numpy()
    theirs = theirs * case.scales + case.biases
    ours = kernels.linear(torch.from_numpy(x), case.matrix).numpy()
    assert (np.isnan(ours) == np.isnan(theirs)).all()
    assert (ours[np.isinf(theirs)] == theirs[np.isinf(theirs)]).all()
    assert name == "int8" or np.isnan(ours[0]).any()
    assert np.unique(ours[np.isnan(ours)].view(np.int32)).tolist() == [0x7FC00000]


@pytest.mark.parametrize("name", STORAGES)
def test_rows_do_not_know_each_other(every_kernels: list[Kernels], name: str) -> None:
    """Any composition of up to 64 rows, on every target, by any cut of the columns."""
    random = np.random.default_rng(7)
    case = _case(name, 45, 96, 7, every_code=False)
    x = _x(64, 96, 7)
    expected = case.expected(x)
    for rows in range(1, 65):
        order = random.integers(0, 64, rows)
        batch = torch.from_numpy(x[order])
        for kernels in every_kernels:
            cut = int(random.integers(0, 46))
            found = torch.full((rows, 45), 7.0)
            kernels.linear(batch, case.matrix, found, (0, cut))
            assert (found[:, cut:] == 7).all()
            kernels.linear(batch, case.matrix, found, (cut, 45))
            assert _differing(found.numpy(), expected[order]) == 0, (rows, cut)


@pytest.mark.parametrize("name", STORAGES)
def test_any_address(kernels: Kernels, name: str) -> None:
    case = _case(name, 7, 64, 5, every_code=False)
    x = _x(5, 64, 5)
    expected = case.expected(x)
    raw = np.frombuffer(case.matrix._buffers[0], np.uint8)
    for offset in (1, 2, 3, 5):
        moved = np.zeros(raw.size + 64, np.uint8)[offset : offset + raw.size]
        moved[:] = raw
        scales = case.matrix._buffers[1]
        matrix = Matrix(
            name, (7, 64), moved, block_scales=scales, scales=case.scales, biases=case.biases
        )
        wide = torch.zeros(5, 131)
        wide[:, 3:67] = torch.from_numpy(x)
        assert _differing(kernels.linear(wide[:, 3:67], matrix).numpy(), expected) == 0


def test_nothing_is_read_or_written_beyond_the_buffers(
    kernels: Kernels, objects_folder: Path
) -> None:
    """Everything ends where a page ends and the next one may not be touched; else: a crash."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_AT_THE_EDGE}",
         kernels.target.name, objects_folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "untouched\n"


_AT_THE_EDGE = """
import ctypes, mmap, sys
from pathlib import Path
import torch
from blyan_node.moe.kernels.library import load
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import runnable

PAGE, libc, kept = mmap.PAGESIZE, ctypes.CDLL(None), []

def at_the_edge(length):
    pages = -(-length // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    kept.append(memory)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    last = ctypes.c_void_p(whole.data_ptr() + pages * PAGE)
    assert libc.mprotect(last, ctypes.c_size_t(PAGE), 0) == 0
    return whole[pages * PAGE - length : pages * PAGE]

kernels = load(Path(sys.argv[2]), next(t for t in runnable() if t.name == sys.argv[1]))
for name, storage in STORAGES.items():
    for depth in (32, 64, 96, 288, 352) if name.startswith("mxfp4") else (1, 31, 33, 100, 1345):
        for rows in (1, 2, 5, 30):
            x, y = at_the_edge(4 * rows * depth), at_the_edge(4 * rows * 7)
            grid, scales = storage.grid, None
            if grid is not None:
                down, across = grid.shape(7, depth)
                scales = at_the_edge(down * across * grid.size)
            weights = at_the_edge(7 * storage.bytes(depth))
            matrix = Matrix(name, (7, depth), weights, block_scales=scales)
            x, y = x.view(torch.float32), y.view(torch.float32)
            x.fill_(1.0)  # not all are multiplied in the same way if they are 0
            kernels.linear(x.view(rows, depth), matrix, y.view(rows, 7))
print("untouched")
"""


def test_the_threads_rules_of_floating_point_do_not_matter(kernels: Kernels) -> None:
    case = _case("float32", 5, 40, 9, every_code=False)
    x = _x(3, 40, 9) * np.float32(1e-38)
    expected = case.expected(x)
    torch.set_flush_denormal(True)
    try:
        found = kernels.linear(torch.from_numpy(x), case.matrix)
        assert torch.tensor([1e-39]).mul(1).item() == 0  # the caller's rules are back
    finally:
        torch.set_flush_denormal(False)
    assert _differing(found.numpy(), expected) == 0


BLOCKED = ((192, 160), (300, 271), (128, 257), (129, 31), (5, 640))


@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize(("outs", "depth"), BLOCKED)
def test_blocks_of_128_by_128_end_where_the_matrix_ends(
    kernels: Kernels, outs: int, depth: int, wild: bool
) -> None:
    case = _case("fp8_blocks", outs, depth, 11, every_code=wild)
    x = _x(70, depth, 12)
    expected = case.expected(x)
    for rows in (1, 2, 5, 70):
        found = kernels.linear(torch.from_numpy(x[:rows]), case.matrix).numpy()
        assert _differing(found, expected[:rows]) == 0, rows
    if outs > 128 < depth and not wild:
        for wrong in (_turned, _first_again):
            assert _differing(wrong(case).expected(x), expected) > 0


def _turned(case: Case) -> Case:
    """The scales of a matrix [depth, outs] in the place of this one's."""
    return _scaled_by(case, lambda scales: scales.T.reshape(scales.shape))


def _first_again(case: Case) -> Case:
    """The last, partial, row of blocks with the scales of the first."""
    return _scaled_by(case, lambda scales: np.concatenate((scales[:-1], scales[:1])))


def _scaled_by(case: Case, wrong: Callable[[Floats], Floats]) -> Case:
    raw, scales = case.matrix._buffers[:2]
    found = np.ascontiguousarray(wrong(scales.view(np.float32))).view(np.uint8)
    return replace(case, values=_fp8_block_values(raw, found))


def test_a_tensor_is_read_in_place(kernels: Kernels) -> None:
    x, w, bias = torch.randn(3, 40), torch.randn(6, 40), torch.randn(6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        stored = w.to(dtype)
        expected = products(x.numpy(), stored.float().numpy(), biases=bias.numpy())
        found = kernels.linear(x, Matrix.of(stored, biases=bias)).numpy()
        assert _differing(found, expected) == 0
    with pytest.raises(ValueError, match="cannot be read in place"):
        Matrix.of(w[:, 1:])
    with pytest.raises(ValueError, match="is not read by columns"):
        Matrix.of(w.to(torch.int8).t())


@pytest.mark.parametrize("name", STORAGES)
def test_millions_of_outputs(every_kernels: list[Kernels], name: str) -> None:
    """Every target and composition gives a row the bits that it has alone; some are checked."""
    random = np.random.default_rng(11)
    for outs, depth in ((1536, 576), (67, 2880), (45, 4096)):
        case = _case(name, outs, depth, depth, every_code=False)
        x = _x(64, depth, outs)
        alone = np.concatenate(
            [every_kernels[0].linear(torch.from_numpy(row[None]), case.matrix) for row in x]
        )
        few = random.integers(0, outs, 16)
        case.only(few)
        assert _differing(alone[:4, few], case.expected(x[:4])) == 0
        for rows in range(1, 65, 3):
            for kernels in every_kernels:
                order = random.integers(0, 64, rows)
                found = kernels.linear(torch.from_numpy(x[order]), case.matrix).numpy()
                assert _differing(found, alone[order]) == 0, (outs, rows, kernels.target.name)
