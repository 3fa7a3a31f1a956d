"""Rows are grouped by expert without losing one, and summed in the order of the router."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.forward.grouping import combine, group_rows, split
from protocols.ids import BlockId, cid

BLOCKS = {n: BlockId(cid(b"expert %d" % n)) for n in range(8)}

choices = st.lists(
    st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True), min_size=0, max_size=40
)


@given(choices, st.integers(1, 10))
def test_every_choice_of_every_row_is_in_exactly_one_group(
    experts: list[list[int]], rows_max: int
) -> None:
    needs = group_rows(experts, BLOCKS)
    assert [need.expert for need in needs] == sorted({e for row in experts for e in row})
    parts = [part for need in needs for part in split(need, rows_max)]
    assert all(0 < len(part.rows) <= rows_max for part in parts)
    seen = [
        (row, rank, part.expert)
        for part in parts
        for row, rank in zip(part.rows, part.ranks, strict=True)
    ]
    assert len(seen) == len(set(seen)) == sum(map(len, experts))
    assert all(experts[row][rank] == expert for row, rank, expert in seen)
    assert all(list(need.rows) == sorted(need.rows) for need in needs)
    assert all(need.block == BLOCKS[need.expert] for need in needs)


def test_an_expert_without_block_is_our_error() -> None:
    with pytest.raises(KeyError, match="8"):
        group_rows([[8]], BLOCKS)


floats = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_the_sum_is_that_of_float32_in_ascending_rank(
    outputs: list[list[float]], data: st.DataObject
) -> None:
    weights = data.draw(
        st.lists(st.floats(0, 1, width=32), min_size=len(outputs), max_size=len(outputs))
    )
    total = np.float32(weights[0]) * np.array(outputs[0], np.float32)
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + np.float32(weight) * np.array(output, np.float32)
    assert np.array(combine(outputs, weights), np.float32).tobytes() == total.tobytes()
