"""`kernels`: how fast weights become outputs, by storage and rows, on one thread.

Every matrix is there several times, so that weights come from memory and not from a cache. What is
beside it is torch's own product of each kind and a loop that only reads, all in one run, in turn.
"""

import time
from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor

from blyan_node.bench.rows import Row, alternate, row
from blyan_node.moe.kernels.library import Kernels, load
from blyan_node.moe.kernels.matrix import Matrix
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.kernels.storages import STORAGES

SIDE = 2880  # the hidden size of gpt-oss
ROWS = (1, 4, 16, 64)
COLD_BYTES = 64 << 20
PRODUCTS_MAX = 1 << 30  # of one measure: many rows need no cold weights to be slow
RUNS = 5
GOALS = {"float32": 1.2, "bfloat16": 1.2, "int8": 1.2}
PEERS = {"float32": "torch float32", "bfloat16": "torch bfloat16", "float16": "torch bfloat16"}
EIGHT_BIT, PACKED = "torch _weight_int8pack_mm", "torch bfloat16 packed"

# A product with each copy of a matrix in turn.
Products = list[Callable[[Tensor], object]]


def measure() -> list[Row]:
    """Two rows for each storage and number of rows: GB/s beside a pure read, and weights/s."""
    torch.set_num_threads(1)
    kernels = load(user_folder())
    ours = {name: _ours(kernels, name) for name in STORAGES}
    peers = _torch_products()
    memory = torch.ones(COLD_BYTES // 4)
    found = []
    for rows in ROWS:
        x = torch.randn(rows, SIDE)
        measures = {name: partial(_seconds, products, x) for name, products in ours.items()}
        measures |= {name: partial(_seconds, products, x) for name, products in peers.items()}
        read = partial(kernels.read, memory, COLD_BYTES)
        taken = alternate(RUNS, read=lambda read=read: _thread_seconds(read), **measures)  # type: ignore[misc]
        for name in STORAGES:
            found += _report(name, rows, taken)
    return found


def _report(name: str, rows: int, taken: dict[str, float]) -> list[Row]:
    grid, size = STORAGES[name].grid, STORAGES[name].bytes(SIDE * SIDE)
    size += 0 if grid is None else grid.size * prod(grid.shape(SIDE, SIDE))
    peer = PEERS.get(name, EIGHT_BIT)
    others = [peer, *(n for n in (*PEERS.values(), EIGHT_BIT, PACKED) if n != peer)]
    beside = {n: SIDE * SIDE / taken[n] / 1e9 if n in taken else None for n in others}
    goal = f">= {GOALS[name]} at one row" if name in GOALS else "beside 8 or 16 bit"
    return [
        row(
            f"kernels {name} x{rows}", "GB/s", size / taken[name] / 1e9,
            beside={"pure read": COLD_BYTES / taken["read"] / 1e9}, goal="near 1 at one row",
            runs=RUNS,
        ),
        row(
            f"kernels {name} x{rows}", "Gweights/s", SIDE * SIDE / taken[name] / 1e9,
            beside=beside, goal=goal, runs=RUNS,
        ),
    ]  # fmt: skip


def _seconds(products: Products, x: Tensor) -> float:
    """The time of one product, weights cold as far as that matters."""
    some = products[: max(1, PRODUCTS_MAX // (x.shape[0] * SIDE * SIDE))]

    def each() -> None:
        for product in some:
            product(x)

    return _thread_seconds(each) / len(some)


def _thread_seconds(action: Callable[[], object]) -> float:
    """The processor's time of this thread, so that other work on the machine counts less."""
    started = time.thread_time()
    action()
    return time.thread_time() - started


def _ours(kernels: Kernels, name: str) -> Products:
    storage, random = STORAGES[name], torch.Generator().manual_seed(1)
    length = storage.bytes(SIDE * SIDE)
    products: Products = []
    for _ in range(-(-COLD_BYTES // length)):
        if storage.bits >= 16:
            weights = torch.randn(SIDE, SIDE, generator=random).to(getattr(torch, name))
        else:
            weights = torch.randint(0, 120, (length,), generator=random, dtype=torch.uint8)
        scales = None
        if storage.grid is not None:
            down, across = storage.grid.shape(SIDE, SIDE)
            scales = torch.full((down, across * storage.grid.size), 60, dtype=torch.uint8)
        matrix = Matrix(name, (SIDE, SIDE), weights, block_scales=scales)
        products.append(partial(_product, kernels, matrix))
    return products


def _product(kernels: Kernels, matrix: Matrix, x: Tensor) -> Tensor:
    return kernels.linear(x, matrix)


def _torch_products() -> dict[str, Products]:
    """Those of torch's products that this machine has."""
    wide = [torch.randn(SIDE, SIDE) for _ in range(-(-COLD_BYTES // (4 * SIDE * SIDE)))]
    half = [w.bfloat16() for w in wide * 2]
    bytes_ = [torch.randint(-127, 127, (SIDE, SIDE), dtype=torch.int8) for _ in wide * 4]
    scale = torch.ones(SIDE, dtype=torch.bfloat16)
    products: dict[str, Products] = {
        "torch float32": [partial(_float32, w) for w in wide],
        "torch bfloat16": [partial(_bfloat16, w) for w in half],
        EIGHT_BIT: [partial(_int8, w, scale) for w in bytes_],
    }
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(w, 1) for w in half]
        products[PACKED] = [partial(_packed, w) for w in packed]
        _packed(packed[0], torch.ones(1, SIDE))
    except RuntimeError:  # oneDNN has no bfloat16 on this processor
        products.pop(PACKED, None)
    return products


def _float32(weight: Tensor, x: Tensor) -> Tensor:
    return torch.mv(weight, x[0]) if len(x) == 1 else torch.mm(x, weight.t())


def _bfloat16(weight: Tensor, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.bfloat16(), weight)


def _packed(weight: Tensor, x: Tensor) -> object:
    return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), weight, None, "none", [], "")


def _int8(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x.bfloat16(), weight, scale)
