"""Products on rows that came from, or go to, the network; for compute threads."""

import numpy as np
import numpy.typing as npt

from blyan_node.moe.arrays import array_of, tensor_of
from blyan_node.moe.experts import Expert

Rows = npt.NDArray[np.float32]


def apply_expert(expert: Expert, rows: Rows) -> Rows:
    """The expert's unweighted output [n, hidden] for `rows` [n, hidden], which are writable."""
    return array_of(expert.apply(tensor_of(rows)))
