"""Many rows have the bits of one row: k in blocks, partial sums that wait, strips, remainders."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llvmlite import ir

from blyan_node.moe.kernels import (
    block_sums,
    block_weights,
    blocks,
    compiler,
    emit,
    library,
    tile,
)
from blyan_node.moe.kernels.library import Kernels
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.storages import STORAGES
from blyan_node.moe.kernels.targets import Many, Target, Unsupported, runnable
from blyan_node.testing.exact_sums import products

ALWAYS, NEVER = (Many(1),) * 3, (Many(1 << 40),) * 3


def _compiled(target: Target, many: tuple[Many, ...]) -> Kernels:
    changed = replace(target, many=many)
    return Kernels(changed, compiler.compile_object(changed))


@pytest.fixture(scope="module")
def blocked() -> list[Kernels]:
    """Kernels of each target that run here for which one row is many."""
    try:
        return [_compiled(target, ALWAYS) for target in runnable()]
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plain() -> Kernels:
    """Those of the best target that never take rows for many."""
    try:
        return _compiled(runnable()[0], NEVER)
    except Unsupported as error:
        pytest.skip(str(error))


def _matrix(name: str, outs: int, depth: int, random: np.random.Generator) -> Matrix:
    storage = STORAGES[name]
    if storage.bits >= 16:
        values = torch.from_numpy(random.standard_normal((outs, depth), np.float32))
        weights = values.to(getattr(torch, name))
    else:
        weights = torch.from_numpy(random.integers(0, 256, (outs, storage.bytes(depth)), np.uint8))
    scales = None
    if storage.grid is not None:
        down, across = storage.grid.shape(outs, depth)
        scales = random.integers(0, 256, (down, across * storage.grid.size), np.uint8)
    channel = random.standard_normal((2, outs)).astype(np.float32)
    shape = (outs, depth)
    return Matrix(name, shape, weights, block_scales=scales, scales=channel[0], biases=channel[1])


def _x(rows: int, depth: int, random: np.random.Generator) -> torch.Tensor:
    size = np.exp(4 * random.standard_normal((rows, 1)))
    return torch.from_numpy((random.standard_normal((rows, depth)) * size).astype(np.float32))


def _differing(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.contiguous().view(torch.int32) != b.contiguous().view(torch.int32)).sum())


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(STORAGES)),
    rows=st.integers(1, 150),
    outs=st.integers(1, 40),
    depth=st.integers(1, 1300),
    seed=st.integers(0, 1 << 30),
)
def test_any_shape_in_any_storage(
    blocked: list[Kernels], plain: Kernels, name: str, rows: int, outs: int, depth: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    depth += -depth % 32 if name.startswith("mxfp4") else 0
    outs *= 7 if name == "fp8_blocks" else 1  # more than one block has
    matrix, x = _matrix(name, outs, depth, random), _x(rows, depth, random)
    expected, cut = plain.linear(x, matrix), int(random.integers(0, outs + 1))
    for kernels in blocked:
        found = torch.full((rows, outs + 3), 7.0)
        kernels.linear(x, matrix, found[:, :outs], (cut, outs))
        assert (found[:, :cut] == 7).all()
        kernels.linear(x, matrix, found[:, :outs], (0, cut))
        assert _differing(found[:, :outs], expected) == 0
        assert (found[:, outs:] == 7).all()


@pytest.mark.parametrize("depth", [31, 32, 33, 384, 385, 415, 417, 800])
def test_the_reference(blocked: list[Kernels], depth: int) -> None:
    random = np.random.default_rng(depth)
    x, w = _x(7, depth, random), _x(14, depth, random)
    expected = torch.from_numpy(products(x.numpy(), w.numpy()))
    for kernels in blocked:
        assert _differing(kernels.linear(x, Matrix.of(w)), expected) == 0


@pytest.mark.parametrize(
    ("rows", "depth", "many"),
    [(63, 630, False), (64, 630, True), (15, 4000, False), (16, 4000, True)],
)
def test_rows_are_many_where_the_target_says_so(rows: int, depth: int, many: bool) -> None:
    """From 16 rows on, if they have 40,000 values; what they call here writes 9."""
    target = runnable()[0]
    module = ir.Module("dispatch")
    module.triple = compiler.llvm.get_process_triple()
    b, arguments = emit.define(module, "many_float32", tile.ARGUMENTS)
    emit.store(b, emit.constant(emit.FLOAT, 9.0), arguments[4])
    b.ret_void()
    inner = tile.product(module, STORAGES["float32"], target, b.function)
    compiler.export(module, inner)
    found = torch.zeros(rows, 1)
    _run(module, target, torch.zeros(rows, depth), Matrix.of(torch.ones(1, depth)), found)
    assert (found[0, 0] == 9.0) == many


def _run(
    module: ir.Module, target: Target, x: torch.Tensor, matrix: Matrix, found: torch.Tensor
) -> None:
    machine = compiler.machine(target)
    code = compiler.Code(target, machine.emit_object(compiler.optimise(str(module), machine)))
    places = matrix.place, x.data_ptr(), 4 * x.shape[1], x.shape[0]
    function = code.function("call_linear_float32", library.LINEAR)
    function.call(*places, found.data_ptr(), 4 * found.shape[1], 0, matrix.outs)


def _blocks_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of earlier blocks are forgotten."""
    call = ir.IRBuilder.call

    def forgetting(b, function, given, *rest):  # type: ignore[no-untyped-def]
        for argument, number in zip(function.args, range(len(given)), strict=True):
            if argument.name == "begins":
                given[number] = emit.constant(emit.I1, 1)
        return call(b, function, given, *rest)

    monkeypatch.setattr(ir.IRBuilder, "call", forgetting)


def _tail_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks._Strip, "widen_tail", lambda self, k, left: None)


def _tail_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a row is taken for a part of it."""

    def pad(b, block, start, count, size):  # type: ignore[no-untyped-def]
        for at in range(0, 32 * size, 4):
            emit.store(b, emit.load(b, emit.I32, start, at), block, at)

    for module in (blocks, block_weights):
        monkeypatch.setattr(module, "pad", pad)


def _registers_in_the_wrong_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second half of the partial sums is taken where the first one lies."""
    monkeypatch.setattr(block_sums, "_PAIR_BYTES", 32)


@pytest.mark.parametrize(
    "breaking", [_blocks_begin_anew, _tail_left_out, _tail_not_padded, _registers_in_the_wrong_half]
)
def test_a_broken_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, breaking: Callable[[pytest.MonkeyPatch], None]
) -> None:
    target = replace(runnable()[0], many=ALWAYS)
    random = np.random.default_rng(5)
    # Memory goes on after both, so that reading too far does no harm.
    x, w = _x(9, 811, random)[:5], _x(15, 811, random)[:13]
    breaking(monkeypatch)
    module = ir.Module("broken")
    module.triple = compiler.llvm.get_process_triple()
    many = blocks.product(module, STORAGES["float32"], target)
    compiler.export(module, tile.product(module, STORAGES["float32"], target, many))
    found = torch.zeros(5, 13)
    _run(module, target, x, Matrix.of(w), found)
    expected = torch.from_numpy(products(x.numpy(), w.numpy()))
    assert found.isfinite().all()
    assert _differing(found, expected) > 0
