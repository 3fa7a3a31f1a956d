"""Pack files: the tensors of one block, contiguous, aligned and memory-mapped.

A pack is a cache. It is made from verified chunks when a block is first loaded, checked against
the manifest when another process opens it again, made anew if it does not fit, and may be deleted
at any time. Where its tensors lie follows from the manifest, so the file has no header of its own.
"""

import mmap
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from protocols import limits
from protocols.ids import BlockId, chunk_hash, cid_text
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry
from storage.errors import FULL, DiskFull

ALIGNMENT = 64  # bytes; a cache line, and what vector kernels want
SUFFIX = ".pack"


@dataclass(frozen=True)
class Pack:
    """The tensors of a block by name: dtype, shape and raw little-endian bytes.

    The views are of a private mapping: they can be written to, and the file does not change.
    """

    block: BlockId
    tensors: Mapping[str, tuple[Dtype, tuple[int, ...], memoryview]]
    bytes: int


class Packs:
    """The pack files in one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._checked: set[BlockId] = set()
        self._making = threading.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)
        for left_over in directory.glob("*.new"):
            left_over.unlink()

    def open(self, block: BlockId, manifest: Manifest, pieces: Iterator[bytes]) -> Pack:
        """The pack of a block; `pieces` are its verified chunks and are read only if needed."""
        path = self._path(block)
        with self._making:
            if block not in self._checked or not path.exists():
                if not _fits(path, manifest):
                    _write(path, manifest, pieces)
                self._checked.add(block)
            return _map(path, block, manifest)  # before anybody can drop it

    def drop(self, block: BlockId) -> None:
        """Deletes the pack of a block; mappings that are in use stay valid."""
        with self._making:
            self._checked.discard(block)
            self._path(block).unlink(missing_ok=True)

    def faults(self, manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
        """Packs that do not fit the manifest of their block, by the block's text id."""
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            manifest = manifests.get(path.stem)
            if manifest is None:
                yield path.stem, "a pack of a block that is not here"
            elif not _fits(path, manifest):
                yield path.stem, "the pack does not fit its manifest"

    def delete(self, text: str) -> None:
        """Deletes a pack by the text id of its block."""
        (self._directory / f"{text}{SUFFIX}").unlink(missing_ok=True)

    @property
    def bytes(self) -> int:
        """How much the pack files take on the disk."""
        return sum(path.stat().st_size for path in self._directory.glob(f"*{SUFFIX}"))

    def _path(self, block: BlockId) -> Path:
        return self._directory / f"{cid_text(block)}{SUFFIX}"


def places(manifest: Manifest) -> Iterator[tuple[TensorEntry, int]]:
    """Each tensor with its offset in the pack."""
    at = 0
    for tensor in manifest.tensors:
        yield tensor, at
        at += -(-tensor.size // ALIGNMENT) * ALIGNMENT


def _length(manifest: Manifest) -> int:
    return max((at + -(-t.size // ALIGNMENT) * ALIGNMENT for t, at in places(manifest)), default=0)


def _fits(path: Path, manifest: Manifest) -> bool:
    """Whether the file is there and every chunk in it has its hash."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != _length(manifest):
                return False
            for tensor, at in places(manifest):
                file.seek(at)
                for index, name in enumerate(tensor.chunks):
                    if chunk_hash(file.read(tensor.chunk_size(index))) != name:
                        return False
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, manifest: Manifest, pieces: Iterator[bytes]) -> None:
    """Writes beside the place and renames: a pack is whole or not there."""
    new = path.with_suffix(".new")
    try:
        with new.open("wb", buffering=limits.chunk_bytes) as file:
            for tensor, at in places(manifest):
                file.seek(at)
                for _ in tensor.chunks:
                    file.write(next(pieces))
            file.truncate(_length(manifest))
        new.rename(path)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"{path.name}: {error.strerror}") from error
        raise
    finally:
        new.unlink(missing_ok=True)


def _map(path: Path, block: BlockId, manifest: Manifest) -> Pack:
    length = _length(manifest)
    if length == 0:
        whole = memoryview(bytearray())
    else:
        with path.open("rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY))
    tensors = {
        tensor.name: (tensor.dtype, tensor.shape, whole[at : at + tensor.size])
        for tensor, at in places(manifest)
    }
    return Pack(block, tensors, length)
