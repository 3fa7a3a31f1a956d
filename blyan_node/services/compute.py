"""Products on rows that came from, or go to, the network, and the thread that computes them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import trio

from blyan_node.moe.arrays import array_of, tensor_of
from blyan_node.moe.experts import Expert
from blyan_node.moe.torch_errors import OutOfMemory, said
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.forward.messages import PROTOCOL, Activate, Activated
from protocols.ids import BlockId
from protocols.precision import Precision

T = TypeVar("T")
Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LayerRows:
    """What one layer is to compute: `rows` [n, hidden], `experts` [n, top_k], blocks by expert.

    All of it in one precision, which belongs to the numeric profile `profile`.
    """

    model: BlockId
    layer: int
    rows: Rows
    experts: Sequence[Sequence[int]]
    blocks: Mapping[int, BlockId]
    precision: Precision
    profile: str


async def in_turn(work: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
    """What `work` gives, in a thread. Raises `Refused` as `refused_if_full`."""
    with refused_if_full():
        return await trio.to_thread.run_sync(work, limiter=limiter)


@contextmanager
def refused_if_full() -> Iterator[None]:
    """Raises `Refused` (BUSY) if a device's memory is full.

    What is held is counted, and what it is computed with is not: it ends with the work.
    """
    try:
        yield
    except OutOfMemory as error:
        raise Refused(
            ErrorCode.BUSY,
            "the device has no memory left for this",
            said(error),
            "Try again later, or start the node with a smaller --memory.",
        ) from None


def apply_expert(expert: Expert, rows: Rows) -> Rows:
    """The expert's unweighted output [n, hidden] for `rows` [n, hidden], which are writable."""
    return array_of(expert.apply(tensor_of(rows)))


def finite_rows(reply: Activated, asked: Activate) -> Rows:
    """The rows [rows_out, hidden] of a reply; raises `RemoteProtocolError` for infinities, NaN."""
    rows = np.frombuffer(reply.data, "<f4").reshape(asked.rows_out, asked.hidden)
    if not np.isfinite(rows).all():
        raise RemoteProtocolError(f"{PROTOCOL} Activated", "a value is not a finite number")
    return rows
