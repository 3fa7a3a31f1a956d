"""Counting what tensors would add to a store, without storing any."""

from collections.abc import Iterable

from protocols import limits
from protocols.ids import ChunkHash, chunk_hash
from protocols.tensors.manifest import Dtype, TensorEntry
from storage.chunks import Chunks
from storage.tensors import cut


class Survey:
    """Takes tensors as an `Ingest` does, hashes them and forgets them.

    `reused_bytes` are stored already or came before in this survey, `new_bytes` are the others.
    """

    def __init__(self, chunks: Chunks) -> None:
        self.new_bytes = 0
        self.reused_bytes = 0
        self._chunks = chunks
        self._seen: set[ChunkHash] = set()

    def write_tensor(
        self, name: str, dtype: Dtype, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]
    ) -> TensorEntry:
        """The entry that an `Ingest` would have given for the same bytes."""
        size = 0
        hashes: list[ChunkHash] = []
        for data in cut(pieces, limits.chunk_bytes):
            hashes.append(chunk_hash(data))
            size += len(data)
            self._count(hashes[-1], len(data))
        return TensorEntry(name, dtype, shape, size, tuple(hashes))

    def _count(self, name: ChunkHash, size: int) -> None:
        if name in self._seen or name in self._chunks:
            self.reused_bytes += size
        else:
            self.new_bytes += size
            self._seen.add(name)
