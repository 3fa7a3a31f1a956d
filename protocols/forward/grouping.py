"""From the router's choices to groups of rows, and back to one row each: the plain reference.

The router gives each row `top_k` experts in its own order (rank 0 first) and as many weights. An
expert gets all of its rows together, in ascending order. The weighted sum of a row is taken in
float32 in ascending rank, every product rounded and every sum rounded, always: this order is a
contract, so that the same rows give the same bits wherever their experts were computed.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocols.ids import BlockId


@dataclass(frozen=True, slots=True)
class Need:
    """Rows of one layer that one expert is to compute.

    `rows` are positions in the layer's batch, `ranks` says for each which place the expert has in
    the row's ranking.
    """

    expert: int
    block: BlockId
    rows: tuple[int, ...]
    ranks: tuple[int, ...]


def group_rows(experts: Sequence[Sequence[int]], blocks: Mapping[int, BlockId]) -> tuple[Need, ...]:
    """The needs of a layer, by ascending expert; `experts` is [rows, top_k], `blocks` by expert.

    Raises `KeyError` for an expert that has no block.
    """
    rows: dict[int, list[tuple[int, int]]] = {}
    for row, chosen in enumerate(experts):
        for rank, expert in enumerate(chosen):
            rows.setdefault(expert, []).append((row, rank))
    return tuple(
        Need(
            expert,
            blocks[expert],
            tuple(row for row, _ in rows[expert]),
            tuple(rank for _, rank in rows[expert]),
        )
        for expert in sorted(rows)
    )


def split(need: Need, rows_max: int) -> tuple[Need, ...]:
    """`need` in pieces of at most `rows_max` rows."""
    return tuple(
        Need(
            need.expert,
            need.block,
            need.rows[start : start + rows_max],
            need.ranks[start : start + rows_max],
        )
        for start in range(0, len(need.rows), rows_max)
    )


def combine(outputs: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The weighted sum of one row's expert outputs [top_k, hidden] in ascending rank.

    Products and sums of two float32 are exact enough in float64 that rounding the result once more
    gives the float32 result.
    """
    total = [_float32(weights[0] * value) for value in outputs[0]]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = [
            _float32(sum_ + _float32(weight * value))
            for sum_, value in zip(total, output, strict=True)
        ]
    return total


def _float32(value: float) -> float:
    result: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return result
