"""Reading and writing safetensors files, strictly and one piece at a time.

A file is eight bytes of little-endian header length, a JSON header (name → dtype, shape,
[begin, end)), and the tensors' bytes. The reader accepts what the format's specification allows and
nothing more: the tensors cover the rest of the file without gap or overlap.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from blyan_node.moe.strict_json import parse_json, refuse
from protocols import limits
from protocols.errors import Refused
from protocols.tensors.manifest import DTYPE_BYTES, Dtype

_LENGTH = struct.Struct("<Q")
PIECE_BYTES = limits.chunk_bytes  # so that a piece is a chunk, and nobody copies it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes are in its file."""

    dtype: Dtype
    shape: tuple[int, ...]
    begin: int
    size: int


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a file is known by: one that took its place, or was written to, has another."""

    device: int
    inode: int
    size: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """That of the file at `path`, behind links; raises `Refused` (BAD_MODEL)."""
        try:
            found = path.stat()
        except OSError as error:
            refuse(f"{path.name}: {error.strerror or error}", path=str(path))
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def require_unchanged(path: Path, before: Stamp) -> None:
    """Raises `Refused` (BAD_MODEL) if the file is not what it was."""
    if Stamp.of(path) != before:
        refuse(f"{path.name}: it was changed while it was read", path=str(path))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name; raises `Refused` (BAD_MODEL) that names file and tensor."""
    refuse_special(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_LENGTH.size)
            if len(start) < _LENGTH.size:
                refuse(f"{path.name}: {size} bytes are no safetensors file", path=str(path))
            (length,) = _LENGTH.unpack(start)
            if length > min(limits.safetensors_header_bytes_max, size - _LENGTH.size):
                refuse(f"{path.name}: a header of {length} bytes does not fit", path=str(path))
            header = file.read(length)
    except OSError as error:
        refuse(f"{path.name}: {error.strerror or error}", path=str(path))
    try:
        return parse_header(header, size - _LENGTH.size - length, path.name)
    except Refused as refused:
        refuse(refused.why, path=str(path))


def header_end(path: Path, size: int) -> int:
    """Where the tensors of a file of `size` bytes begin, whose first eight bytes are in `path`.

    Raises `Refused` (BAD_MODEL).
    """
    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
    if len(start) < _LENGTH.size:
        refuse(f"{path.name}: {size} bytes are no safetensors file", path=str(path))
    (length,) = _LENGTH.unpack(start)
    if length > min(limits.safetensors_header_bytes_max, size - _LENGTH.size):
        refuse(f"{path.name}: a header of {length} bytes does not fit", path=str(path))
    return _LENGTH.size + int(length)


def refuse_special(path: Path) -> None:
    """Raises `Refused` (BAD_MODEL) for a pipe or a device: opening one may wait for ever."""
    if path.exists() and not path.is_file():
        refuse(f"{path.name} is no regular file", path=str(path))


def parse_header(header: bytes, data_bytes: int, where: str) -> dict[str, StoredTensor]:
    """Reads a header whose tensors fill `data_bytes`; offsets become offsets in the file."""
    first = _LENGTH.size + len(header)
    found = parse_json(header, where)
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        refuse(f"{where}: __metadata__ is not text by name")
    tensors = {name: _entry(name, entry, first, where) for name, entry in found.items()}
    end = first
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin != end:
            refuse(f"{where}: {name[:80]!a} begins at {tensor.begin}, not at {end}")
        end += tensor.size
    if end != first + data_bytes:
        refuse(f"{where}: {data_bytes} bytes of tensors, but the header describes {end - first}")
    return tensors


def _entry(name: str, entry: Any, first: int, where: str) -> StoredTensor:
    place = f"{where}: {name[:80]!a}"
    try:
        length = len(name.encode())
    except UnicodeEncodeError:  # JSON can name half of a surrogate pair, and nothing else can
        refuse(f"{place}: the name is no text")
    if length > limits.tensor_name_bytes_max:
        refuse(f"{place}: the name is too long")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(f"{place}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in Dtype.__members__:
        refuse(f"{place}: dtype {str(dtype)[:20]!r} is not read by this version")
    if not _naturals(shape) or len(shape) > limits.tensor_dims_max:
        refuse(f"{place}: shape {str(shape)[:60]}")
    if not _naturals(offsets) or len(offsets) != 2:
        refuse(f"{place}: data_offsets {str(offsets)[:60]}")
    begin, end = offsets
    size = prod(shape) * DTYPE_BYTES[Dtype(dtype)]
    if end - begin != size or size > limits.tensor_bytes_max:
        refuse(f"{place}: data_offsets {begin}..{end} do not fit {size} bytes")
    return StoredTensor(Dtype(dtype), tuple(shape), first + begin, size)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def read_pieces(path: Path, begin: int, size: int) -> Iterator[bytes]:
    """The bytes [begin, begin + size) of a file, at most `PIECE_BYTES` at a time."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            while size:
                piece = file.read(min(size, PIECE_BYTES))
                if not piece:
                    refuse(f"{path.name}: it became shorter while it was read", path=str(path))
                size -= len(piece)
                yield piece
    except OSError as error:
        refuse(f"{path.name}: {error.strerror or error}", path=str(path))


def header_bytes(tensors: Mapping[str, tuple[Dtype, tuple[int, ...]]]) -> bytes:
    """The start of a file that holds `tensors` in this order, with their bytes to follow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {
            "dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def write_whole(path: Path, pieces: Iterable[bytes | memoryview]) -> int:
    """Writes a file so that it is there whole or not at all; returns its size in bytes."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        size = _copy(pieces, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return size


def _copy(pieces: Iterable[bytes | memoryview], file: BinaryIO) -> int:
    return sum(file.write(piece) for piece in pieces)
