"""`widening`: products with weights that are held as they are stored, beside widened ones.

One thread, an expert of gpt-oss-20b's size (gate and up: 5760 x 2880). In turn with the product of
its float32 matrix, which is what takes the most memory and no widening; each call takes another of
a few matrices, so that none of them is in a cache.
"""

from collections.abc import Callable
from itertools import count

import numpy as np

from blyan_node.bench.rows import Row, alternate, row, seconds
from blyan_node.moe.arrays import tensor_of
from blyan_node.moe.numerics import linear, use_threads
from blyan_node.moe.stored import Mxfp4, Weight
from blyan_node.moe.weights import in_place
from blyan_node.services.compute import Rows
from protocols.tensors.manifest import Dtype

OUT, INTO = 5760, 2880
MATRICES = 3
RUNS = {1: 25, 32: 7}  # by how many rows are multiplied at once
GOALS = {1: {"bfloat16": 1.5, "mxfp4": 3.0}, 32: {"bfloat16": 1.1, "mxfp4": 1.3}}


def measure() -> list[Row]:
    """Milliseconds of one product in each precision, at one row and at 32."""
    use_threads(1)
    random = np.random.default_rng(1)
    floats = [random.standard_normal((OUT, INTO), np.float32) for _ in range(MATRICES)]
    weights: dict[str, list[Weight]] = {
        "float32": [tensor_of(one) for one in floats],
        "bfloat16": [
            in_place(Dtype.BF16, (OUT, INTO), one.view(np.uint16)[:, 1::2].copy().data.cast("B"))
            for one in floats
        ],
        "mxfp4": [_mxfp4(random) for _ in range(MATRICES)],
    }
    made = []
    for rows, runs in RUNS.items():
        x = random.standard_normal((rows, INTO), np.float32)
        taken = alternate(runs, **{name: _timed(x, some) for name, some in weights.items()})
        for name, goal in GOALS[rows].items():
            made.append(
                row(
                    f"widening {name} {rows}",
                    "ms",
                    taken[name],
                    beside={"float32": taken["float32"]},
                    goal=f"ratio <= {goal}, in {4.25 / 32 if name == 'mxfp4' else 0.5:.2f} of "
                    "the memory",
                    runs=runs,
                )
            )
    return made


def _timed(x: Rows, weights: list[Weight]) -> Callable[[], float]:
    turns, rows = count(), tensor_of(x)
    return lambda: 1e3 * seconds(lambda: linear(rows, weights[next(turns) % len(weights)]))


def _mxfp4(random: np.random.Generator) -> Mxfp4:
    blocks = random.integers(0, 256, (OUT, INTO // 32, 16), np.uint8)
    scales = random.integers(115, 125, (OUT, INTO // 32), np.uint8)
    return Mxfp4(
        in_place(Dtype.U8, blocks.shape, blocks.data.cast("B")),
        in_place(Dtype.U8, scales.shape, scales.data.cast("B")),
    )
