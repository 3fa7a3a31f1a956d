"""Counting what storing would do, without storing: a dry run of `storage.tensors.Ingest`."""

from collections.abc import Iterable

from protocols import limits
from protocols.dag.header import Block
from protocols.ids import ChunkHash, ManifestId, chunk_hash
from protocols.tensors.manifest import Dtype, TensorEntry
from storage.chunks import Chunks
from storage.tensors import cut


class Tally:
    """Takes what an `Ingest` takes and counts as it does, but only reads the store's index.

    `reused_bytes` are stored already, or were given before; `new_bytes` are the others. Remembers
    the hash of every new chunk: some 100 bytes of memory for each 256 KiB.
    """

    def __init__(self, chunks: Chunks) -> None:
        self.new_bytes = 0
        self.reused_bytes = 0
        self._chunks = chunks
        self._given: set[ChunkHash] = set()

    def write_tensor(
        self, name: str, dtype: Dtype, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]
    ) -> TensorEntry:
        """Hashes the raw little-endian bytes of a tensor and counts its chunks."""
        size = 0
        hashes: list[ChunkHash] = []
        for data in cut(pieces, limits.chunk_bytes):
            hashes.append(chunk_hash(data))
            size += len(data)
            self._count(hashes[-1], len(data))
        return TensorEntry(name, dtype, shape, size, tuple(hashes))

    def stage(self, block: Block, manifest_id: ManifestId, manifest: bytes) -> None:
        """Stages nothing: blocks are counted by who makes them."""

    def flush(self) -> None:
        """Returns at once: nothing is on its way."""

    def _count(self, chunk: ChunkHash, size: int) -> None:
        if chunk in self._given or chunk in self._chunks:
            self.reused_bytes += size
        else:
            self._given.add(chunk)
            self.new_bytes += size
