"""Changing the tensors and fields of a checkpoint that is there."""

import importlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor


def tensors_by_file(path: Path) -> list[tuple[Path, dict[str, Tensor]]]:
    """The safetensors files of a directory, each with its tensors by name."""
    load: Any = importlib.import_module("safetensors.torch").load_file
    return [(file, load(file)) for file in sorted(path.glob("*.safetensors"))]


def all_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a directory by name."""
    return {name: one for _, found in tensors_by_file(path) for name, one in found.items()}


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Replaces a file, and what the index beside it says of it if there is one."""
    save: Any = importlib.import_module("safetensors.torch").save_file
    save(tensors, file, {"format": "pt"})
    index = file.parent / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text())
        weights = {n: f for n, f in document["weight_map"].items() if f != file.name}
        document["weight_map"] = weights | dict.fromkeys(tensors, file.name)
        index.write_text(json.dumps(document))


def rewrite_config(path: Path, **fields: Any) -> None:
    """Changes fields of `config.json`; None takes one out."""
    config = json.loads((path / "config.json").read_text()) | fields
    given = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(given, indent=2))
