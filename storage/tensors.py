"""Writing tensors as chunks, in a stream, while another thread stores what is hashed.

An `Ingest` is one writer's session: tensors go in piece by piece and blocks are staged behind them.
Pieces are cut and hashed on the caller's thread; a thread of the session writes full batches, and a
block only behind its last chunk, when that is synced. `limits.ingest_batch_bytes` and
`limits.ingest_batches_waiting_max` bound what is in memory, whatever the tensors' sizes.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from protocols import limits
from protocols.dag.header import Block
from protocols.ids import ChunkHash, ManifestId, chunk_hash
from protocols.tensors.manifest import Dtype, TensorEntry
from storage.blocks import Blocks, ManifestRow
from storage.chunks import Chunks


@dataclass
class _Batch:
    chunks: list[tuple[ChunkHash, bytes]] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    manifests: list[ManifestRow] = field(default_factory=list)
    bytes: int = 0
    sync: bool = False


class Ingest:
    """A context manager; leaving it without an error stores everything or raises what failed.

    `reused_bytes` were stored before, `new_bytes` were not; both count what `flush` or leaving has
    waited for. The garbage collector waits.
    """

    def __init__(self, chunks: Chunks, blocks: Blocks, closed: Callable[[], None]) -> None:
        self.new_bytes = 0
        self.reused_bytes = 0
        self._chunks = chunks
        self._blocks = blocks
        self._closed = closed
        self._batch = _Batch()
        self._queue: queue.Queue[_Batch | None] = queue.Queue(limits.ingest_batches_waiting_max)
        self._staged = _Batch()  # blocks whose chunks are not synced yet
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._store_batches, name="ingest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        try:
            self._send(sync=True)  # after an error as well: the next attempt finds what was done
            self._queue.put(None)
            self._thread.join()
        finally:
            self._closed()
        if error is None:
            self._raise()

    def write_tensor(
        self, name: str, dtype: Dtype, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]
    ) -> TensorEntry:
        """Takes the raw little-endian bytes of a tensor; raises `DiskFull` as soon as it shows."""
        size = 0
        hashes: list[ChunkHash] = []
        for data in cut(pieces, limits.chunk_bytes):
            hashes.append(chunk_hash(data))
            size += len(data)
            self._add(hashes[-1], data)
        return TensorEntry(name, dtype, shape, size, tuple(hashes))

    def stage(self, block: Block, manifest_id: ManifestId, manifest: bytes) -> None:
        """Stages a block once everything that was written before it is stored."""
        self._batch.blocks.append(block)
        self._batch.manifests.append((manifest_id, manifest))

    def flush(self) -> None:
        """Returns when everything so far is stored, or raises what failed."""
        self._send(sync=True)
        self._queue.join()
        self._raise()

    def _add(self, chunk: ChunkHash, data: bytes) -> None:
        self._batch.chunks.append((chunk, data))
        self._batch.bytes += len(data)
        if self._batch.bytes >= limits.ingest_batch_bytes:
            self._raise()
            self._send()

    def _send(self, *, sync: bool = False) -> None:
        self._batch.sync = sync
        self._queue.put(self._batch)
        self._batch = _Batch()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _store_batches(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._store(batch)
            except BaseException as error:  # handed to the thread that feeds this one
                self._error = error
            finally:
                self._queue.task_done()

    def _store(self, batch: _Batch) -> None:
        """Chunks first; once they are synced, the blocks that consist of them."""
        staged = self._staged
        staged.bytes += batch.bytes
        staged.blocks += batch.blocks
        staged.manifests += batch.manifests
        sync = batch.sync or staged.bytes >= limits.ingest_unsynced_bytes_max
        new = self._chunks.put(batch.chunks, sync=sync)
        self.new_bytes += new
        self.reused_bytes += batch.bytes - new
        if sync:
            if staged.blocks:
                self._blocks.stage(staged.blocks, staged.manifests)
            self._staged = _Batch()


def cut(pieces: Iterable[bytes | memoryview], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of `size`, the last one shorter; no empty piece."""
    rest = bytearray()
    for piece in pieces:
        if not rest and len(piece) == size and isinstance(piece, bytes):
            yield piece  # as it is: most pieces are
            continue
        view = memoryview(piece).cast("B")
        at = 0
        if rest:
            at = min(size - len(rest), len(view))
            rest += view[:at]
            if len(rest) < size:
                continue
            yield bytes(rest)
            rest.clear()
        while len(view) - at >= size:
            yield bytes(view[at : at + size])
            at += size
        rest += view[at:]
    if rest:
        yield bytes(rest)
