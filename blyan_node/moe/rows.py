"""Rows between torch and bytes, so that services move them without knowing torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blyan_node.moe.safetensors_file import header_bytes, write_whole
from blyan_node.moe.trunk import Attended
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.tensors.manifest import Dtype

_DTYPES = {torch.float32: Dtype.F32, torch.bfloat16: Dtype.BF16, torch.int64: Dtype.I64}


def rows_to_bytes(rows: Tensor) -> bytes:
    """Rows float32 [n, hidden] as little-endian bytes."""
    return rows.contiguous().numpy().astype("<f4", copy=False).tobytes()


def rows_from_bytes(data: bytes | memoryview, hidden: int) -> Tensor:
    """The inverse: [n, hidden]; raises `RemoteProtocolError` if `data` is not a number of rows."""
    if hidden <= 0 or len(data) % (4 * hidden):
        raise RemoteProtocolError("rows", f"{len(data)} bytes are no rows of {hidden} floats")
    values = np.frombuffer(data, dtype="<f4").astype(np.float32, copy=True)
    return torch.from_numpy(values.reshape(-1, hidden))


class ExpertRows:
    """One layer's rows grouped by expert, and their results as they come in.

    `groups` maps each chosen expert to the rows that it must see, ascending. `take` gives those
    rows, `put` their results; when `missing` is empty, `results` is what `Trunk.combine` wants.
    """

    def __init__(self, attended: Attended) -> None:
        self._normed = attended.normed
        self._ranks: dict[int, list[tuple[int, int]]] = {}
        for row, chosen in enumerate(attended.experts.tolist()):
            for rank, expert in enumerate(chosen):
                self._ranks.setdefault(expert, []).append((row, rank))
        self.groups = {
            expert: [row for row, _ in places] for expert, places in sorted(self._ranks.items())
        }
        self.missing = set(self.groups)
        self.results = torch.empty(*attended.experts.shape, attended.normed.shape[1])

    def take(self, rows: Sequence[int]) -> Tensor:
        """The rows [len(rows), hidden] with these indexes, in this order."""
        return self._normed[list(rows)]

    def put(self, expert: int, rows: Tensor) -> None:
        """The results of `expert` for its rows of `groups`, in that order; once an expert."""
        if expert not in self.missing:
            raise LocalProtocolError(f"expert {expert} has nothing to bring here")
        places = self._ranks[expert]
        if rows.shape != (len(places), self._normed.shape[1]):
            raise RemoteProtocolError("rows", f"expert {expert} gave {list(rows.shape)}")
        for index, (row, rank) in enumerate(places):
            self.results[row, rank] = rows[index]
        self.missing.discard(expert)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes a safetensors file whole or not at all; returns its size in bytes."""
    described = {name: (_DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    bodies = (t.contiguous().view(-1).view(torch.uint8).numpy().data for t in tensors.values())
    return write_whole(path, (header_bytes(described), *bodies))
