"""Giving space back: chunks that no block names, and bodies that nobody keeps.

Mark and sweep. What a staged or accepted block's manifest names is marked and stays; a session of
writing, whose chunks no block names yet, keeps the sweep out.
"""

from collections.abc import Iterable

from protocols.ids import BlockId, ChunkHash, ManifestId
from storage import keys
from storage.store import Store


def collect(store: Store) -> int:
    """Removes chunks that no block names; how many bytes that freed. 0 while somebody writes."""
    with store.no_ingest() as alone:
        if not alone:
            return 0
        before = store.index.counters.next_chunk
        marked = named_chunks(store)
        doomed = []
        for key, value in store.index.engine.iterate(keys.CHUNK.prefix()):
            name = ChunkHash(keys.CHUNK.parse(key).hash)
            if name not in marked and keys.CHUNK_VALUE.unpack(value)[0] < before:
                doomed.append(name)
        return store.chunks.remove(doomed)


def drop_body(store: Store, id: BlockId) -> int:
    """Removes the body of one block; how many bytes that freed.

    Its header and manifest stay, because the chain goes through them, and so does a pin: `fsck` and
    `verify` find that the body is missing. Chunks that other blocks share stay as well.
    """
    _, manifest = store.body(id)
    with store.no_ingest() as alone:
        if not alone:
            return 0
        others = named_chunks(store, without=id)
        store.packs.drop(id)
        own = dict.fromkeys(name for name, _ in manifest.chunks() if name not in others)
        return store.chunks.remove(list(own))


def named_chunks(store: Store, *, without: BlockId | None = None) -> set[ChunkHash]:
    """The chunks that the manifests of staged and accepted blocks name."""
    bodies: set[ManifestId] = set()
    for kept in store.every():
        if kept.block.id != without and kept.block.header.body is not None:
            bodies.add(kept.block.header.body)
    return {name for body in bodies for name in chunks_of(store, body)}


def chunks_of(store: Store, body: ManifestId) -> Iterable[ChunkHash]:
    """The chunks of a manifest; none if it is not here."""
    manifest = store.manifest(body)
    return () if manifest is None else (name for name, _ in manifest.chunks())
