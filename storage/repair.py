"""Mending a store: what is broken is dropped, so that the network can bring it back.

Damaged chunks are removed, and the blocks that lack them are marked as wanted. Where the chain's
rows do not follow from the blocks, they are all made anew: the good blocks go through admission
once more in memory, in the order of the old log, and the result replaces the old rows in one batch.
The log then has another name, so peers read it from the beginning, and we read theirs likewise.
"""

import os
from pathlib import Path

from protocols.dag.admission import Accepted, Parked, admit
from protocols.dag.header import Block, Kind
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ChunkHash
from storage import keys, leveldb, schema
from storage.blocks import Blocks
from storage.chunks import fault
from storage.errors import Corrupt
from storage.fsck import Report
from storage.index import Index
from storage.lock import Lock
from storage.memory import MemoryEngine
from storage.pins import Pin
from storage.store import CHUNKS_FOLDER, INDEX_FOLDER, Store, open_index

CHAIN_FAMILIES = (
    keys.BLOCK, keys.MANIFEST, keys.LOG, keys.MODEL, keys.SUCCESSOR, keys.RELEASE, keys.STAGED,
    keys.SUBJECTS, keys.HEAD, keys.PAST_HEAD, keys.ROOT, keys.AUTHOR, keys.CURSOR,
)  # fmt: skip


def repair_databases(data: Path) -> None:
    """Makes databases that LevelDB cannot read open again, with what it still can read."""
    lock = Lock(data)
    try:
        for folder in (INDEX_FOLDER, CHUNKS_FOLDER):
            leveldb.repair(data / folder)
        index = open_index(data)
        schema.restore_schema(index, os.urandom(schema.LOG_ID_BYTES))
        index.close()
    finally:
        lock.release()


def repair(store: Store, report: Report) -> None:
    """Mends what `report` found; the store is to be closed and opened again afterwards."""
    store.chunks.remove(sorted(report.bad_chunks))
    _take_in(store, report.strays)
    if not report.chain:
        _rebuild(store, report)
    _count_chunks(store, report.unknown)
    _want(store, report.incomplete)
    for bad in report.bad:
        if bad.what == "pack":
            store.packs.delete(bad.id)


def _take_in(store: Store, strays: list[bytes]) -> None:
    """Bytes that the index does not know become known if they are whole, else they go."""
    puts, deletes = [], []
    for key in strays:
        row = keys.DATA.parse(key)
        name = ChunkHash(row.hash)
        try:
            data = store.chunks.data.get(key)
        except Corrupt:
            data = None
        if data is None or fault(name, len(data), data) is not None or name in store.chunks:
            deletes.append(key)
        else:
            puts.append((keys.CHUNK.key(name), keys.CHUNK_VALUE.pack(row.seq, len(data))))
    with store.index.lock:
        store.index.commit(puts, counters=store.index.counters)
        store.chunks.data.batch([], deletes, sync=True)


def _count_chunks(store: Store, unknown: list[bytes]) -> None:
    """Counts what the counters say about chunks, and removes rows that nobody knows."""
    count, size = 0, 0
    for _, value in store.index.engine.iterate(keys.CHUNK.prefix()):
        count += 1
        size += keys.CHUNK_VALUE.unpack(value)[1]
    last = next(iter(store.chunks.data.iterate(keys.DATA.prefix(), reverse=True)), None)
    following = 0 if last is None else keys.DATA.parse(last[0]).seq + 1
    with store.index.lock:
        counters = store.index.counters
        after = counters._replace(
            chunks=count,
            chunk_bytes=size,
            next_chunk=max(following, counters.next_chunk),
        )
        store.index.commit([], unknown, counters=after)


def _want(store: Store, incomplete: set[BlockId]) -> None:
    """Marks blocks as wanted; for what else they are pinned they are again once they are back."""
    if incomplete:
        store.pin(*incomplete, reason=Pin.WANTED)


def _rebuild(store: Store, report: Report) -> None:
    """Replaces every row about the chain by what follows from the good blocks."""
    engine = MemoryEngine()
    index = Index(engine)
    fresh = Blocks(index)
    kept = _good_blocks(store, report, fresh)
    _admit_all(kept, fresh, store)
    old = store.index.engine
    deletes = [key for f in CHAIN_FAMILIES for key, _ in old.iterate(f.prefix())]
    puts = [row for f in CHAIN_FAMILIES for row in engine.iterate(f.prefix())]
    log_id = os.urandom(schema.LOG_ID_BYTES)
    puts.append((keys.SCHEMA_KEY, keys.SCHEMA_VALUE.pack(schema.SCHEMA_VERSION, log_id)))
    new = {key for key, _ in puts}
    with store.index.lock:
        counters = store.index.counters._replace(
            log=index.counters.log, staged=index.counters.staged
        )
        store.index.commit(puts, [key for key in deletes if key not in new], counters=counters)
    # A pinned block that did not come through is wanted, not kept.
    pinned = {id for id, reason in store.pins.every() if reason is not Pin.WANTED}
    report.incomplete |= {id for id in pinned if fresh.block(id) is None}


def _good_blocks(store: Store, report: Report, fresh: Blocks) -> list[Block]:
    """Blocks that can be read, in the order of the old log, staged ones last."""
    kept: list[tuple[int, Block]] = []
    for key, _ in store.index.engine.iterate(keys.BLOCK.prefix()):
        id = BlockId(key[1:])
        if id not in report.bad_blocks and (found := store.kept(id)) is not None:
            kept.append((found.seq or 1 << 63, found.block))
    kept.sort(key=lambda pair: pair[0])
    rows = []
    for _, block in kept:
        body = block.header.body
        data = None if body in report.bad_manifests or body is None else store.manifest_bytes(body)
        if data is not None and body is not None:
            rows.append((body, data))
    fresh.stage([], rows)
    return [block for _, block in kept]


def _admit_all(blocks: list[Block], fresh: Blocks, store: Store) -> None:
    """Admits blocks until no more fit; the rest are dropped and come back from the network."""
    waiting, before = blocks, -1
    while len(waiting) != before:
        before = len(waiting)
        waiting = [block for block in waiting if not _admit(block, fresh, store)]


def _admit(block: Block, fresh: Blocks, store: Store) -> bool:
    """Whether a block is settled: in, or never to be."""
    if block.header.kind is Kind.RELEASE and fresh.release_subjects(block.id) is None:
        try:
            subjects = store.release_subjects(block.id)
        except RemoteProtocolError:
            subjects = None
        if subjects is not None:
            fresh.stage([], release_subjects={block.id: subjects})
    try:
        verdict = admit(block, fresh)
    except RemoteProtocolError:
        return True
    if isinstance(verdict, Parked):
        return False
    if isinstance(verdict, Accepted):
        fresh.accept(verdict.blocks, heads={verdict.model: (verdict.heads, verdict.root)})
    else:
        fresh.stage([block])
    return True
