"""A Hugging Face directory as a source of subjects, checked whole before a tensor is read.

`Checkpoint.open` reads the configuration and the headers of all safetensors files and holds them
against the layout that the configuration asks for: a missing file or tensor, a wrong shape, a type
that is not read, or a tensor that nobody asked for is refused by name. Tensors are then read piece
by piece, so memory does not grow with the model. Pickles are never opened. A file that becomes
another one in the meantime is refused: what is published is one state of a directory.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, Self

import numpy as np

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.families import form_of_sources, layout, parse_config, sources
from blyan_node.moe.generation_config import check_generation
from blyan_node.moe.layout import Form, SubjectLayout, TensorLayout
from blyan_node.moe.mtp import check_mtp_size, mtp_parts
from blyan_node.moe.safetensors_file import (
    Stamp,
    StoredTensor,
    read_header,
    read_pieces,
    refuse_special,
    require_unchanged,
)
from blyan_node.moe.strict_json import parse_json, refuse
from protocols import limits
from protocols.ids import Subject, parse_subject
from protocols.tensors.manifest import Dtype

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_TRAVELS = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.(json|jinja|txt|md|model)|(LICENSE|NOTICE)[A-Za-z0-9._-]{0,60}"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NUMBERED = re.compile(r"model-[0-9]{1,9}-of-[0-9]{1,9}\.safetensors")
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One tensor of a subject, ready to be read: `pieces` yields its little-endian bytes."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    size: int
    pieces: Iterator[bytes]


@dataclass(frozen=True)
class Checkpoint:
    """An opened directory: its configuration, its small files and where every tensor is."""

    path: Path
    config: ModelConfig
    files: Mapping[str, bytes]  # everything small that is no weight, by name
    subjects: tuple[SubjectLayout, ...]
    _tensors: Mapping[str, tuple[Path, StoredTensor]]
    _by_name: Mapping[Subject, SubjectLayout]
    _stamps: Mapping[Path, Stamp]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Reads and checks `path`; raises `Refused` (BAD_MODEL) that names what is wrong."""
        if not path.is_dir():
            refuse(f"{path} is not a directory", path=str(path))
        config = parse_config(_read_small(path / "config.json"))
        files = _small_files(path)
        check_generation(files)
        stamps, tensors = _find_tensors(path)
        form = form_of_sources(config, tensors)
        kept = mtp_parts(config, {name: one.shape for name, (_, one) in tensors.items()})
        for part in kept:
            check_mtp_size(part, {name: one.dtype for name, (_, one) in tensors.items()})
        behind = {tensor.source for part in kept for tensor in part.tensors}
        _check(config, form, {n: one for n, one in tensors.items() if n not in behind})
        subjects = (*(_there(part, tensors) for part in layout(config, form)), *kept)
        by_name = {part.subject: part for part in subjects}
        return cls(path, config, files, subjects, tensors, by_name, stamps)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for _, tensor in self._tensors.values())

    @property
    def kept_bytes(self) -> int:
        """Those of layers that are kept and never computed (`blyan_node.moe.mtp`)."""
        return sum(
            self._tensors[tensor.source][1].size
            for part in self.subjects
            if parse_subject(part.subject).kind == "mtp"
            for tensor in part.tensors
        )

    def describe(self, subject: Subject) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
        """Type and shape of a subject's tensors by local name; none of one that is not there."""
        tensors = self._by_name[subject].tensors if subject in self._by_name else ()
        return {t.name: (self._tensors[t.source][1].dtype, t.shape) for t in tensors}

    def read(self, subject: Subject) -> Iterator[TensorSource]:
        """A subject's tensors in the layout's order, one at a time, piece by piece."""
        for tensor in self._by_name[subject].tensors:
            yield self._source(tensor)

    def read_tensor(self, subject: Subject, name: str) -> Iterator[bytes]:
        """The pieces of one tensor by its local name."""
        return self._source(self._by_name[subject].tensor(name)).pieces

    def require_unchanged(self) -> None:
        """Raises `Refused` (BAD_MODEL) if a file of weights is not what it was at the start."""
        for path, before in self._stamps.items():
            require_unchanged(path, before)

    def load(self, subject: Subject) -> dict[str, tuple[Dtype, tuple[int, ...], memoryview]]:
        """A whole subject in memory, in the form in which the engine takes weights."""
        return {t.name: (t.dtype, t.shape, _aligned(t)) for t in self.read(subject)}

    def _source(self, tensor: TensorLayout) -> TensorSource:
        path, stored = self._tensors[tensor.source]
        require_unchanged(path, self._stamps[path])  # so that it is not found out hours later
        begin, size = stored.begin, stored.size
        if tensor.index is not None:
            size //= stored.shape[0]
            begin += tensor.index * size
        pieces = read_pieces(path, begin, size)
        return TensorSource(tensor.name, stored.dtype, tensor.shape, size, pieces)


def _aligned(source: TensorSource) -> memoryview:
    """The bytes of a tensor in memory that begins at a multiple of 64 bytes."""
    buffer = np.empty(source.size + 63, dtype=np.uint8)
    first = -buffer.ctypes.data % 64
    view = buffer.data[first : first + source.size]
    at = 0
    for piece in source.pieces:
        view[at : at + len(piece)] = piece
        at += len(piece)
    return view


def _read_small(path: Path) -> bytes:
    refuse_special(path)
    try:
        if path.stat().st_size > limits.model_file_bytes_max:
            refuse(f"{path.name} is too large: at most {limits.model_file_bytes_max} bytes")
        return path.read_bytes()
    except OSError as error:
        refuse(f"{path.name}: {error.strerror or error}", path=str(path))


def _small_files(path: Path) -> dict[str, bytes]:
    travel = [e for e in path.iterdir() if e.name != INDEX_FILE and _TRAVELS.fullmatch(e.name)]
    for entry in travel:
        if entry.is_symlink() and not entry.exists():
            refuse(f"{entry.name} is a link that leads nowhere", path=str(entry))
    names = sorted(entry.name for entry in travel if entry.is_file())
    if len(names) > limits.model_files_max:
        refuse(f"{len(names)} files beside the weights, at most {limits.model_files_max}")
    return {name: _read_small(path / name) for name in names}


def is_small(name: str) -> bool:
    """Whether a file of this name is read whole: one that travels with a model, or an index."""
    return name == INDEX_FILE or _TRAVELS.fullmatch(name) is not None


def is_read(name: str) -> bool:
    """Whether a file of this name may be read at all: a small one, or one that may hold weights."""
    return is_small(name) or _SHARD.fullmatch(name) is not None


def weight_files(path: Path, there: Collection[str]) -> list[str]:
    """Which of the files `there` hold the weights, by the index in `path` if there is one.

    Raises `Refused` (BAD_MODEL): none do, one is missing, or there is a shard that is of another
    version of the model.
    """
    if SINGLE_FILE in there:
        files, lists = [SINGLE_FILE], f"{SINGLE_FILE} has the weights"
    elif INDEX_FILE in there:
        files = sorted(set(_read_index(path / INDEX_FILE).values()))
        lists = f"{INDEX_FILE} does not list it"
    else:
        _refuse_no_weights(there, path)
    for shard in files:
        if shard not in there:
            refuse(
                f"the shard {shard} is missing, and {INDEX_FILE} lists it", path=str(path / shard)
            )
    for name in sorted(set(there).difference(files)):
        if _NUMBERED.fullmatch(name):
            refuse(f"the shard {name} is one too many: {lists}", path=str(path / name))
    return files


def _refuse_no_weights(there: Collection[str], path: Path) -> NoReturn:
    pickles = sorted(name for name in there if name.endswith(_PICKLES))
    beside = f"; {pickles[0]} is a pickle, and none is ever read" if pickles else ""
    refuse(f"neither {SINGLE_FILE} nor {INDEX_FILE} is in {path}{beside}", path=str(path))


def _find_tensors(path: Path) -> tuple[dict[Path, Stamp], dict[str, tuple[Path, StoredTensor]]]:
    """The files of weights as they are now, and every tensor in them by its name on disk."""
    files = weight_files(path, {file.name for file in path.iterdir()})
    stamps = {path / file: Stamp.of(path / file) for file in files}
    headers = {file: read_header(path / file) for file in files}
    if files == [SINGLE_FILE]:
        return stamps, {n: (path / SINGLE_FILE, t) for n, t in headers[SINGLE_FILE].items()}
    by_name = _read_index(path / INDEX_FILE)
    tensors: dict[str, tuple[Path, StoredTensor]] = {}
    for shard, header in headers.items():
        for name, stored in header.items():
            if by_name.get(name) != shard:
                where = f"in {by_name[name]}" if name in by_name else "nowhere"
                refuse(f"{shard}: {name[:80]!a} is {where} by {INDEX_FILE}", path=str(path / shard))
            tensors[name] = (path / shard, stored)
    for name, shard in by_name.items():
        if name not in tensors:
            refuse(f"{shard}: {name[:80]!a} is missing", path=str(path / shard), tensor=name)
    return stamps, tensors


def _read_index(path: Path) -> dict[str, str]:
    index = parse_json(_read_small(path), INDEX_FILE)
    by_name = index.get("weight_map")
    if not isinstance(by_name, dict):
        refuse(f"{INDEX_FILE}: weight_map is missing", path=str(path))
    for name, shard in by_name.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            refuse(f"{INDEX_FILE}: {name[:80]!a} is in {str(shard)[:80]!r}, which is no file name"
                   " of a shard", path=str(path))  # fmt: skip
    return by_name


def _check(
    config: ModelConfig, form: Form, tensors: Mapping[str, tuple[Path, StoredTensor]]
) -> None:
    wanted, every = sources(config, form), layout(config, form)
    idle = {tensor.source for part in every for tensor in part.tensors if tensor.idle}
    for name, shape in wanted.items():
        if name in idle and name not in tensors:
            continue
        if name not in tensors:
            refuse(f"the tensor {name} is missing", tensor=name)
        path, stored = tensors[name]
        if stored.shape != shape:
            refuse(
                f"{path.name}: {name} has the shape {list(stored.shape)}, but config.json asks for"
                f" {list(shape)}",
                tensor=name,
            )
    for name in tensors:
        if name not in wanted:
            _refuse_extra(name, len(config.layers))
    for tensor in (tensor for part in every for tensor in _there(part, tensors).tensors):
        path, stored = tensors[tensor.source]
        if stored.dtype not in tensor.dtypes:
            read = " or ".join(tensor.dtypes)
            refuse(
                f"{path.name}: {tensor.source} is {stored.dtype}, this version reads {read}",
                tensor=tensor.source,
            )


def _there(part: SubjectLayout, names: Collection[str]) -> SubjectLayout:
    """A part without the idle tensors that a directory does not have."""
    there = (one for one in part.tensors if not one.idle or one.source in names)
    return replace(part, tensors=tuple(there))


def _refuse_extra(name: str, layers: int) -> NoReturn:
    layer = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    if layer is not None and int(layer[1]) >= layers:
        refuse(
            f"the tensor {name[:80]!a} is of a layer behind the {layers} of config.json and those"
            " that it counts as num_nextn_predict_layers",
            tensor=name,
        )
    refuse(f"the tensor {name[:80]!a} does not belong to this configuration", tensor=name)
