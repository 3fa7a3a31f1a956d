"""Pack files: the tensors of one block, contiguous, aligned and memory-mapped.

A pack is a cache. It is made from verified chunks when a block is first loaded, checked against
the manifest when another process opens it again, made anew if it does not fit, and deleted when the
block is let go; a mapping that is in use stays valid. Where its tensors lie follows from the
manifest, so the file has no header of its own. What is mapped is read only, so the memory that it
takes is the file's, which the system can take back, and nothing of it is a copy.
"""

import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from protocols.ids import BlockId, chunk_hash, cid_text
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry
from storage.errors import FULL, DiskFull

ALIGNMENT = 64  # bytes; a cache line, and what vector kernels want
SUFFIX = ".pack"
# What is written at once lies in one large page of memory where the file system has such: read a
# tenth faster than from pages of 4 KiB.
_PAGE_BYTES = 2 << 20


@dataclass(frozen=True)
class Pack:
    """The tensors of a block by name: dtype, shape and raw little-endian bytes, read only."""

    block: BlockId
    tensors: Mapping[str, tuple[Dtype, tuple[int, ...], memoryview]]
    bytes: int


class Packs:
    """The pack files in one directory. `bytes` is how much they take on the disk.

    `make_sure_of_room` is asked before a file of so many bytes is written; raises `DiskFull`.
    """

    def __init__(self, directory: Path, make_sure_of_room: Callable[[int], None]) -> None:
        self._directory = directory
        self._make_sure_of_room = make_sure_of_room
        self._opened: set[str] = set()  # by this process; what it wrote or found to fit
        self._locks: dict[str, threading.Lock] = {}
        self._counting = threading.Lock()
        directory.mkdir(mode=0o700, exist_ok=True)
        for left_over in directory.glob("*.new"):
            left_over.unlink()
        self._sizes = {
            path.stem: path.stat().st_size for path in sorted(directory.glob(f"*{SUFFIX}"))
        }

    def open(self, block: BlockId, manifest: Manifest, pieces: Iterator[bytes]) -> Pack:
        """The pack of a block; `pieces` are its verified chunks and are read only if needed.

        Raises `DiskFull` if it is to be written and there is no room.
        """
        text = cid_text(block)
        path = self._path(text)
        with self._lock(text):
            if text not in self._opened or not path.exists():
                if not _fits(path, manifest):
                    self._make(text, manifest, pieces)
                self._opened.add(text)
            return _map(path, block, manifest)  # before anybody can drop it

    def drop(self, block: BlockId) -> int:
        """Deletes the pack of a block, and returns its size; mappings in use stay valid."""
        return self.delete(cid_text(block))

    def delete(self, text: str) -> int:
        """The same by the text id of the block."""
        with self._lock(text):
            return self._delete(text)

    def drop_idle(self) -> int:
        """Deletes what an earlier run left and nobody has opened since; how many bytes."""
        freed = 0
        for text in sorted(self._sizes.keys() - self._opened):
            lock = self._lock(text)
            if lock.acquire(blocking=False):  # else somebody is just opening it
                try:
                    freed += self._delete(text)
                finally:
                    lock.release()
        return freed

    def faults(self, manifests: Mapping[str, Manifest]) -> Iterator[tuple[str, str]]:
        """Packs that do not fit the manifest of their block, by the block's text id."""
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            manifest = manifests.get(path.stem)
            if manifest is None:
                yield path.stem, "a pack of a block that is not here"
            elif not _fits(path, manifest):
                yield path.stem, "the pack does not fit its manifest"

    def _make(self, text: str, manifest: Manifest, pieces: Iterator[bytes]) -> None:
        """Writes a pack; its size counts from before it is written."""
        size = length_of(manifest)
        self._delete(text)
        with self._counting:
            self._make_room(size)
            self._sizes[text] = size
        try:
            _write(self._path(text), manifest, pieces)
        except BaseException:  # whatever it was, there is no file
            del self._sizes[text]
            raise

    def _make_room(self, size: int) -> None:
        try:
            self._make_sure_of_room(size)
        except DiskFull:
            if not self.drop_idle():
                raise
            self._make_sure_of_room(size)

    def _delete(self, text: str) -> int:
        self._path(text).unlink(missing_ok=True)
        self._opened.discard(text)
        return self._sizes.pop(text, 0)

    def _lock(self, text: str) -> threading.Lock:
        """Who opens, writes or deletes a pack holds its lock; others go on."""
        return self._locks.setdefault(text, threading.Lock())

    def _path(self, text: str) -> Path:
        return self._directory / f"{text}{SUFFIX}"

    @property
    def bytes(self) -> int:
        """How much the pack files take on the disk."""
        return sum(tuple(self._sizes.values()))


def places(manifest: Manifest) -> Iterator[tuple[TensorEntry, int]]:
    """Each tensor with its offset in the pack."""
    at = 0
    for tensor in manifest.tensors:
        yield tensor, at
        at += -(-tensor.size // ALIGNMENT) * ALIGNMENT


def length_of(manifest: Manifest) -> int:
    """Bytes of the pack of a body."""
    return max((at + -(-t.size // ALIGNMENT) * ALIGNMENT for t, at in places(manifest)), default=0)


def _fits(path: Path, manifest: Manifest) -> bool:
    """Whether the file is there and every chunk in it has its hash."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != length_of(manifest):
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
        with new.open("wb", buffering=_PAGE_BYTES) as file:
            for tensor, at in places(manifest):
                file.write(bytes(at - file.tell()))
                for _ in tensor.chunks:
                    file.write(next(pieces))
            file.truncate(length_of(manifest))
        new.rename(path)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFull(f"{path.name}: {error.strerror}") from error
        raise
    finally:
        new.unlink(missing_ok=True)


def _map(path: Path, block: BlockId, manifest: Manifest) -> Pack:
    length = length_of(manifest)
    if length == 0:
        whole = memoryview(b"")
    else:
        with path.open("rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ))
    tensors = {
        tensor.name: (tensor.dtype, tensor.shape, whole[at : at + tensor.size])
        for tensor, at in places(manifest)
    }
    return Pack(block, tensors, length)
