"""Blocks that came before what they depend on, in a pool that nobody can fill for everybody.

The pool is bounded by count and by bytes, and each source (a peer) has a share of both. A source
over its share loses its own oldest block; a full pool takes the oldest block of the source that
uses most. What is evicted is not lost: sync brings it again in its order.

Of all that a block waits for the pool watches one, the last in order of ids: until that is here the
block cannot be admitted. Else a release of n blocks would be looked at n times, each time at all n.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from protocols import limits
from protocols.dag.admission import Parked
from protocols.dag.header import Block
from protocols.ids import BlockId

ENTRY_BYTES = 512  # what an entry costs beside its header: indexes and objects


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How much the pool holds, and how much of it may come from one source."""

    blocks: int = limits.parked_blocks_max
    bytes: int = limits.parked_bytes_max
    source_blocks: int = limits.parked_blocks_max // 4
    source_bytes: int = limits.parked_bytes_max // 4


class Orphan(msgspec.Struct, frozen=True):
    """A parked block, who sent it, and its manifest if that came with it."""

    block: Block
    source: str
    manifest: bytes | None = None


@dataclass(slots=True)
class _Entry:
    orphan: Orphan
    watched: bytes
    bytes: int

    @property
    def source(self) -> str:
        return self.orphan.source


class OrphanPool:
    """Parked blocks by what they wait for."""

    def __init__(self, bounds: PoolLimits = PoolLimits()) -> None:
        self._bounds = bounds
        self._entries: dict[BlockId, _Entry] = {}
        self._by_wait: dict[bytes, dict[BlockId, None]] = {}
        self._by_source: dict[str, dict[BlockId, None]] = {}  # oldest first
        self._source_bytes: dict[str, int] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, id: BlockId) -> bool:
        return id in self._entries

    def add(self, parked: Parked, source: str, manifest: bytes | None = None) -> list[BlockId]:
        """Parks a block; the ids that had to go for it (itself, if it is too large)."""
        before = self._entries.get(parked.block.id)
        if before is not None:
            source = before.source  # who repeats another's block does not take it over
            manifest = manifest or before.orphan.manifest
            self.remove(parked.block.id)
        cost = len(parked.block.raw) + ENTRY_BYTES + len(manifest or b"")
        if cost > self._bounds.source_bytes:
            return [parked.block.id]
        watched = max(parked.waits_for)
        self._insert(_Entry(Orphan(parked.block, source, manifest), watched, cost))
        evicted: list[BlockId] = []
        while self._over(source):
            evicted.append(self._evict(source))
        while len(self._entries) > self._bounds.blocks or self.bytes > self._bounds.bytes:
            evicted.append(self._evict(max(self._source_bytes, key=self._source_bytes.__getitem__)))
        return evicted

    def arrived(self, ids: Iterable[bytes]) -> list[Orphan]:
        """Takes out the blocks that may have waited for `ids` alone."""
        waiting = {id: None for name in ids for id in self._by_wait.get(name, ())}
        return [entry.orphan for id in waiting if (entry := self.remove(id))]

    def missing(self) -> frozenset[bytes]:
        """What is watched: one of the things that each block waits for."""
        return frozenset(self._by_wait)

    def remove(self, id: BlockId) -> _Entry | None:
        """Forgets a block."""
        entry = self._entries.pop(id, None)
        if entry is None:
            return None
        waiting = self._by_wait[entry.watched]
        waiting.pop(id)
        if not waiting:
            del self._by_wait[entry.watched]
        self._by_source[entry.source].pop(id)
        self._source_bytes[entry.source] -= entry.bytes
        if not self._by_source[entry.source]:
            del self._by_source[entry.source], self._source_bytes[entry.source]
        self.bytes -= entry.bytes
        return entry

    def _insert(self, entry: _Entry) -> None:
        id = entry.orphan.block.id
        self._entries[id] = entry
        self._by_wait.setdefault(entry.watched, {})[id] = None
        self._by_source.setdefault(entry.source, {})[id] = None
        self._source_bytes[entry.source] = self._source_bytes.get(entry.source, 0) + entry.bytes
        self.bytes += entry.bytes

    def _over(self, source: str) -> bool:
        return (
            len(self._by_source.get(source, ())) > self._bounds.source_blocks
            or self._source_bytes.get(source, 0) > self._bounds.source_bytes
        )

    def _evict(self, source: str) -> BlockId:
        oldest = next(iter(self._by_source[source]))
        self.remove(oldest)
        return oldest
