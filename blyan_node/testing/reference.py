"""The engine's own single-process reference over a checkpoint's directory."""

from pathlib import Path

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.reference import Reference


def open_reference(path: Path) -> Reference:
    """The plain model that reads its weights from `path`."""
    checkpoint = Checkpoint.open(path)
    return Reference(checkpoint.config, checkpoint.load)
