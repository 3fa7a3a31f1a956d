"""The store of one node: what it keeps of the chain, and the bytes that the chain names.

    data/lock       one process at a time
    data/index/     LevelDB: blocks, manifests, log, heads, pins, where each chunk is
    data/chunks/    LevelDB: tensor bytes in order of arrival
    data/packs/     memory-mapped copies of blocks that are in use: a cache

All calls block; any thread may read, and writers take turns. Order of writes: chunks, sync, then
one atomic batch with header, manifest and indexes.
"""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from protocols import limits
from protocols.dag.header import Block
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ChunkHash, PeerId, chunk_hash, cid_text, key_of
from protocols.tensors.manifest import Manifest, TensorEntry
from storage import keys, schema
from storage.blocks import Blocks
from storage.chunks import Chunks
from storage.engine import Engine
from storage.errors import BlockMissing, Corrupt
from storage.gate import Gate
from storage.index import Index
from storage.leveldb import LevelDBEngine
from storage.lock import Lock
from storage.mapped import let_pages_go
from storage.packs import Pack, Packs
from storage.pins import Pin, Pins
from storage.tensors import Ingest

INDEX_FOLDER = "index"
CHUNKS_FOLDER = "chunks"
PACKS_FOLDER = "packs"
INDEX_BUFFER_BYTES = 8 * limits.MIB
CHUNK_BUFFER_BYTES = 32 * limits.MIB
INDEX_CACHE_BYTES = 8 * limits.MIB
CHUNK_CACHE_BYTES = 1 * limits.MIB


@dataclass(frozen=True)
class Stats:
    """How much is here; `--disk` bounds `chunk_bytes` and `pack_bytes` together."""

    accepted: int
    staged: int
    chunks: int
    chunk_bytes: int
    pack_bytes: int


class Store(Blocks):
    """Everything that a node keeps. A context manager; made by `open_store`.

    `reads` counts, by block, how often the tensors of a block were read.
    """

    def __init__(
        self,
        index: Engine,
        chunks: Engine,
        directory: Path,
        *,
        quota_bytes: int | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        self.schema = schema.open_schema(index, str(directory), os.urandom(schema.LOG_ID_BYTES))
        self.index = Index(index)
        super().__init__(self.index)
        self.chunks = Chunks(
            self.index,
            chunks,
            quota_bytes=quota_bytes,
            free_bytes=free_bytes or (lambda: shutil.disk_usage(directory).free),
            beside=lambda: self.packs.bytes,
        )
        self.chunks.adopt()
        self.pins = Pins(self.index)
        self.packs = Packs(directory / PACKS_FOLDER, self.chunks.make_sure_of_room)
        self.reads: Counter[BlockId] = Counter()
        self._directory = directory
        self._read_bytes = 0  # of bodies, since the pages of the last ones were let go
        self._writers = Gate()
        self._resources = contextlib.ExitStack()

    @property
    def quota_bytes(self) -> int | None:
        """What the store may take; None: no bound."""
        return self.chunks.quota_bytes

    def set_quota(self, quota_bytes: int | None) -> None:
        """From now on the chunks may take this much; nothing is removed for it at once."""
        self.chunks.quota_bytes = quota_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the databases and lets go of the lock."""
        self._resources.close()

    @property
    def log_id(self) -> bytes:
        """16 bytes that name this store's acceptance log."""
        return self.schema.log_id

    def stats(self) -> Stats:
        """Counts that cost nothing to ask for."""
        of = self.index.counters
        return Stats(of.log, of.staged, of.chunks, of.chunk_bytes, self.packs.bytes)

    # Cursors into the logs of peers

    def cursor(self, peer: PeerId, log_id: bytes) -> int:
        """The number up to which the log `log_id` of a peer was read; 0 if it never was."""
        value = self.index.engine.get(keys.CURSOR.key(key_of(peer), log_id))
        return 0 if value is None else int(keys.NUMBER.unpack(value)[0])

    def set_cursor(self, peer: PeerId, log_id: bytes, after: int) -> None:
        """Remembers how far the log of a peer was read."""
        with self.index.lock:
            row = (keys.CURSOR.key(key_of(peer), log_id), keys.NUMBER.pack(after))
            self.index.commit([row], counters=self.index.counters)

    # Chunks and tensors

    def has_chunk(self, name: ChunkHash) -> bool:
        """Whether a chunk is here."""
        return name in self.chunks

    def get_chunk(self, name: ChunkHash) -> bytes | None:
        """The verified bytes of a chunk, None if it is not here. Raises `Corrupt`."""
        return self.chunks.get(name)

    def put_chunks(self, items: Iterable[tuple[ChunkHash, bytes]]) -> int:
        """Stores chunks that came from outside, durably; how many bytes were new.

        Raises `RemoteProtocolError` if one does not have its hash, `DiskFull`.
        """
        rows = list(items)
        for name, data in rows:
            if chunk_hash(data) != name:
                raise RemoteProtocolError("chunk", f"its bytes do not have the hash {name.hex()}")
        return self.chunks.put(rows)

    @contextlib.contextmanager
    def ingest(self) -> Iterator[Ingest]:
        """A session of writing tensors and staging blocks (see `storage.tensors`)."""
        self._writers.enter()
        with Ingest(self.chunks, self, self._writers.leave) as session:
            yield session

    def no_ingest(self) -> contextlib.AbstractContextManager[bool]:
        """Keeps sessions of writing out; False if one is under way."""
        return self._writers.closed()

    def body(self, id: BlockId) -> tuple[Block, Manifest]:
        """A block and its manifest; raises `BlockMissing`."""
        block = self.block(id)
        if block is None:
            raise BlockMissing(id, None, "its header is not here")
        manifest = None if block.header.body is None else self.manifest(block.header.body)
        if manifest is None:
            raise BlockMissing(id, block.header.subject, "its manifest is not here")
        return block, manifest

    def read_tensor(self, block: Block, entry: TensorEntry) -> Iterator[bytes]:
        """The verified bytes of one tensor of a block, chunk by chunk.

        Raises `BlockMissing` or `Corrupt`, both with the subject and the block.
        """
        for index, name in enumerate(entry.chunks):
            try:
                data = self.chunks.get(name)
            except Corrupt as error:
                raise _corrupt_in(block, entry, error.why) from error
            if data is None:
                raise BlockMissing(
                    block.id, block.header.subject, f"a chunk of {entry.name} is not here"
                )
            if len(data) != entry.chunk_size(index):
                why = f"chunk {index} has {len(data)} bytes, and its manifest says otherwise"
                raise _corrupt_in(block, entry, why)
            yield data
            self.count_read(len(data))

    def count_read(self, size: int) -> None:
        """Counts what is read of whole bodies, which is read once: its pages are let go in time."""
        self._read_bytes += size
        if self._read_bytes >= limits.read_bytes_resident_max:
            self._read_bytes = 0
            let_pages_go(self._directory / CHUNKS_FOLDER)

    def read_body(self, id: BlockId) -> Iterator[tuple[TensorEntry, Iterator[bytes]]]:
        """The tensors of a block in order, each to be read before the next."""
        block, manifest = self.body(id)
        self.reads[id] += 1
        for entry in manifest.tensors:
            yield entry, self.read_tensor(block, entry)

    def pack(self, id: BlockId) -> Pack:
        """The tensors of a block, memory-mapped. Raises `BlockMissing`, `Corrupt`, `DiskFull`."""
        block, manifest = self.body(id)
        self.reads[id] += 1
        pieces = (data for entry in manifest.tensors for data in self.read_tensor(block, entry))
        return self.packs.open(id, manifest, pieces)

    def missing_chunks(self, id: BlockId) -> list[tuple[ChunkHash, int]]:
        """What the body of a block lacks here, without repeats. Raises `BlockMissing`."""
        _, manifest = self.body(id)
        return [
            (name, size)
            for name, size in dict(manifest.chunks()).items()
            if name not in self.chunks
        ]

    def is_stored(self, id: BlockId) -> bool:
        """Whether the whole body of a block is here."""
        try:
            return not self.missing_chunks(id)
        except BlockMissing:
            return False

    # Keeping and letting go

    def pin(self, *blocks: BlockId, reason: Pin) -> None:
        """Keeps the bodies of blocks: `gc` leaves them, `fsck` expects them."""
        self.pins.add(list(blocks), reason)

    def unpin(self, *blocks: BlockId, reason: Pin) -> None:
        """Takes back one reason to keep the bodies of blocks."""
        self.pins.remove(list(blocks), reason)

    def wanted(self) -> list[BlockId]:
        """Blocks that a repair found broken and that should be fetched again."""
        return [block for block, reason in self.pins.every() if reason is Pin.WANTED]


def open_store(data: Path, *, quota_bytes: int | None = None) -> Store:
    """Opens the store in the directory `data`, which is made if it is not there.

    Raises `StoreInUse`, `UnknownSchema`, `Corrupt`, `DiskFull`. `quota_bytes` bounds the bytes of
    chunks and packs.
    """
    data.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.ExitStack() as resources:
        lock = Lock(data)
        resources.callback(lock.release)
        index = open_index(data)
        resources.callback(index.close)
        chunks = LevelDBEngine(
            data / CHUNKS_FOLDER, buffer_bytes=CHUNK_BUFFER_BYTES, cache_bytes=CHUNK_CACHE_BYTES
        )
        resources.callback(chunks.close)
        store = Store(index, chunks, data, quota_bytes=quota_bytes)
        store._resources = resources.pop_all()
    return store


def open_index(data: Path) -> LevelDBEngine:
    """The index database of the store in `data`, whose lock the caller holds."""
    return LevelDBEngine(
        data / INDEX_FOLDER, buffer_bytes=INDEX_BUFFER_BYTES, cache_bytes=INDEX_CACHE_BYTES
    )


def _corrupt_in(block: Block, entry: TensorEntry, why: str) -> Corrupt:
    subject = block.header.subject or block.header.kind
    return Corrupt(
        f"{subject} is damaged in this store",
        f"block {cid_text(block.id)}, {entry.name}: {why}",
        subject=str(subject),
        block=cid_text(block.id),
    )
