"""The engine's own single-process reference over a checkpoint's directory."""

from pathlib import Path

from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.reference import Reference
from blyan_node.moe.weights import load_part
from blyan_node.testing.arithmetic import best
from protocols.ids import Subject
from protocols.precision import PUBLISHED, Precision


def open_reference(
    path: Path, arithmetic: Arithmetic | None = None, precision: Precision = PUBLISHED
) -> Reference:
    """The plain model of `path`, with the best arithmetic that there is unless one is given."""
    checkpoint = Checkpoint.open(path)
    return Reference(checkpoint.config, checkpoint.load, arithmetic or best(), precision)


def local_tensors(path: Path, subject: Subject) -> dict[str, Tensor]:
    """The tensors of one subject of `path` by local name, as an update of it names them."""
    checkpoint = Checkpoint.open(path)
    part = next(part for part in checkpoint.subjects if part.subject == subject)
    return load_part(part, checkpoint.load(subject))
