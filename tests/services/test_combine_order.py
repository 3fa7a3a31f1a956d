"""The engine sums a row's experts in the order that the protocol's plain reference has."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.moe.arithmetic import choose
from blyan_node.testing.arithmetic import best
from protocols.forward.grouping import combine


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 9))
def test_the_engine_and_the_plain_reference_agree_bit_for_bit(
    seed: int, top_k: int, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((rows, top_k, 24)).astype(np.float32)
    weights = rng.random((rows, top_k)).astype(np.float32)
    residual = torch.zeros(rows, 24)
    for rules in (best(), choose("torch")):
        total = rules.combine(residual, torch.from_numpy(weights), torch.from_numpy(outputs))
        for row in range(rows):
            plain = combine(outputs[row].tolist(), weights[row].tolist())
            assert total[row].tolist() == plain
