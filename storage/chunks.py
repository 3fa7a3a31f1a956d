"""Chunks: pieces of tensor bytes, each stored once, whatever number of blocks it belongs to.

A chunk is written under the next number of arrival (sequential keys cost LevelDB no rewriting) and
found through a row of the index, hash → number. Both databases are written, in this order:

    1. chunk bytes, synced           a crash here leaves chunks that no index row knows:
    2. index rows and counters       `adopt` takes them in when the store is opened again

and a chunk leaves in the opposite order, through a row that says that it is leaving, so that no
crash makes an index row point at nothing or leaves bytes behind for ever.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from protocols import limits
from protocols.errors import LocalProtocolError
from protocols.ids import ChunkHash
from storage import keys
from storage.engine import Engine
from storage.errors import Corrupt, DiskFull
from storage.index import Index

LEAVING_BATCH = 1_024
ChunkRow = tuple[ChunkHash, bytes]


class Chunks:
    """The chunk database and its index.

    `quota_bytes` bounds its bytes together with those that `beside` counts; `free_bytes` says how
    much the disk has left.
    """

    def __init__(
        self,
        index: Index,
        data: Engine,
        *,
        quota_bytes: int | None,
        free_bytes: Callable[[], int],
        beside: Callable[[], int] = lambda: 0,
    ) -> None:
        self._index = index
        self.data = data
        self.quota_bytes = quota_bytes
        self._free_bytes = free_bytes
        self._beside = beside
        self._pending: dict[ChunkHash, tuple[int, int]] = {}  # written, and not synced

    def find(self, name: ChunkHash) -> tuple[int, int] | None:
        """The number and the size of a chunk, None if it is not here."""
        pending = self._pending.get(name)
        if pending is not None:
            return pending
        row = self._index.engine.get(keys.CHUNK.key(name))
        if row is None:
            return None
        seq, size = keys.CHUNK_VALUE.unpack(row)
        return seq, size

    def __contains__(self, name: ChunkHash) -> bool:
        return self.find(name) is not None

    def get(self, name: ChunkHash) -> bytes | None:
        """The bytes of a chunk, verified; None if it is not here. Raises `Corrupt`."""
        found = self.find(name)
        if found is None:
            return None
        data = self.data.get(keys.DATA.key(found[0], name))
        if data is None and self.find(name) is None:
            return None  # it left between the two reads
        why = fault(name, found[1], data)
        if data is None or why is not None:
            raise Corrupt(f"chunk {name.hex()} is damaged", str(why), chunk=name.hex())
        return data

    def put(self, rows: Iterable[ChunkRow], *, sync: bool = True) -> int:
        """Stores the chunks that are new; how many bytes that was. Raises `DiskFull`.

        Without `sync` they are readable at once and durable with the next `put` that syncs. The
        caller has made sure that each name is the hash of its bytes.
        """
        with self._index.lock:
            new = {name: data for name, data in rows if name not in self}
            if any(not 0 < len(data) <= limits.chunk_bytes for data in new.values()):
                raise LocalProtocolError("a chunk is empty or too large")
            size = sum(map(len, new.values()))
            if new:
                self.make_sure_of_room(size)
            first = self._index.counters.next_chunk + len(self._pending)
            places = {name: (first + i, len(data)) for i, (name, data) in enumerate(new.items())}
            # One by one: chunks need not arrive together, and LevelDB copies small batches faster.
            for name, data in new.items():
                self.data.batch([(keys.DATA.key(places[name][0], name), data)])
            self._pending.update(places)
            if sync and self._pending:
                self.data.batch([], sync=True)
                self._enter(self._pending, first + len(new))
                self._pending = {}
            return size

    def remove(self, names: Sequence[ChunkHash]) -> int:
        """Removes chunks; how many bytes came back."""
        freed = 0
        for at in range(0, len(names), LEAVING_BATCH):
            freed += self._remove_some(names[at : at + LEAVING_BATCH])
        return freed

    def adopt(self) -> None:
        """Finishes what a crash interrupted; called once when the store is opened."""
        self._finish_leaving()
        following = self._index.counters.next_chunk
        start = keys.DATA.key(following, bytes(32))
        found: dict[ChunkHash, tuple[int, int]] = {}
        bad: list[bytes] = []
        for key, data in self.data.iterate(keys.DATA.prefix(), start=start):
            stored = keys.DATA.parse(key)
            following = stored.seq + 1
            name = ChunkHash(stored.hash)
            known = found.get(name) or self.find(name)
            if known is None and fault(name, len(data), data) is None:
                found[name] = stored.seq, len(data)
            elif known is None or known[0] != stored.seq:
                bad.append(key)
        if bad:
            self.data.batch([], bad, sync=True)
        if following != self._index.counters.next_chunk:
            self._enter(found, following)

    def _enter(self, places: Mapping[ChunkHash, tuple[int, int]], following: int) -> None:
        """Makes chunks known that are on the disk; the next one gets the number `following`."""
        counters = self._index.counters
        after = counters._replace(
            chunks=counters.chunks + len(places),
            chunk_bytes=counters.chunk_bytes + sum(size for _, size in places.values()),
            next_chunk=following,
        )
        rows = [(keys.CHUNK.key(n), keys.CHUNK_VALUE.pack(*at)) for n, at in places.items()]
        self._index.commit(rows, counters=after)

    def _remove_some(self, names: Sequence[ChunkHash]) -> int:
        with self._index.lock:
            found = {name: at for name in names if (at := self.find(name)) is not None}
            freed = sum(size for _, size in found.values())
            counters = self._index.counters
            after = counters._replace(
                chunks=counters.chunks - len(found), chunk_bytes=counters.chunk_bytes - freed
            )
            leaving = [(keys.LEAVING.key(seq, name), b"") for name, (seq, _) in found.items()]
            self._index.commit(leaving, [keys.CHUNK.key(name) for name in found], counters=after)
            self._finish_leaving()
            return freed

    def _finish_leaving(self) -> None:
        rows = [key for key, _ in self._index.engine.iterate(keys.LEAVING.prefix())]
        if rows:
            stored = [keys.LEAVING.parse(key) for key in rows]
            self.data.batch([], [keys.DATA.key(*at) for at in stored], sync=True)
            self._index.commit([], rows, counters=self._index.counters)

    def make_sure_of_room(self, size: int) -> None:
        """Raises `DiskFull` if so many bytes more are not allowed or do not fit."""
        stored = self._stored()
        if self.quota_bytes is not None and stored + size > self.quota_bytes:
            raise DiskFull(
                f"{stored + size} bytes would be stored, --disk allows {self.quota_bytes}"
            )
        free = self._free_bytes()
        if free < size + limits.disk_reserve_bytes:
            raise DiskFull(
                f"the disk has {free} bytes free; {limits.disk_reserve_bytes} stay in reserve"
            )

    def room(self) -> int:
        """How many bytes more are allowed and fit."""
        free = self._free_bytes() - limits.disk_reserve_bytes
        if self.quota_bytes is not None:
            free = min(free, self.quota_bytes - self._stored())
        return max(0, free)

    def _stored(self) -> int:
        """What counts under the quota."""
        with self._index.lock:
            pending = sum(size for _, size in self._pending.values())
            return self._index.counters.chunk_bytes + pending + self._beside()


def fault(name: ChunkHash, size: int, data: bytes | None) -> str | None:
    """What is wrong with the stored bytes of a chunk; None if nothing is."""
    if data is None:
        return "its bytes are gone"
    if len(data) != size:
        return f"{len(data)} bytes, not {size}"
    if hashlib.sha256(data).digest() != name:
        return "its bytes do not have its hash"
    return None
