"""Giving space back: chunks that no block names, and bodies that nobody keeps.

Mark and sweep. What a staged or accepted block's manifest names is marked and stays; a session of
writing, whose chunks no block names yet, keeps the sweep out.
"""

from collections.abc import Iterable, Set

from protocols.dag.header import Block
from protocols.ids import BlockId, ChunkHash, ManifestId
from storage import keys
from storage.errors import DiskFull
from storage.packs import Pack, length_of
from storage.pins import Pin
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


def make_room(store: Store, needed: int, keep: Set[BlockId] = frozenset()) -> int:
    """Frees at least `needed` bytes if it can; how many bytes that were. 0 while somebody writes.

    First packs that an earlier run left and what no block names; then bodies that nobody has
    pinned, which the network has as well: those that are no head any more before those that are.
    Never the bodies of `keep`.
    """
    freed = store.packs.drop_idle()
    if freed >= needed:
        return freed
    freed += collect(store)
    if freed >= needed:
        return freed
    with store.no_ingest() as alone:
        if not alone:
            return freed
        victims, kept = _unkept(store, keep)
        marked = {name for body in kept for name in chunks_of(store, body)}
        for block in victims:
            if freed >= needed:
                break
            body = block.header.body
            own = [] if body is None else list(chunks_of(store, body))
            if own:
                freed += store.chunks.remove([name for name in own if name not in marked])
    return freed


def pack(store: Store, id: BlockId, keep: Set[BlockId] = frozenset()) -> Pack:
    """The tensors of a block, memory-mapped; makes room for the file if it has to.

    Never of the bodies of `keep`. Raises `BlockMissing`, `Corrupt`, `DiskFull`.
    """
    try:
        return store.pack(id)
    except DiskFull:
        size = length_of(store.body(id)[1])
        if make_room(store, size, keep | {id}) == 0:
            raise
        return store.pack(id)


def _unkept(store: Store, keep: Set[BlockId]) -> tuple[list[Block], set[ManifestId]]:
    """Blocks whose bodies may go, in the order in which they should, and bodies that stay."""
    pinned = {id for id, reason in store.pins.every() if reason is not Pin.WANTED} | keep
    heads = {id for model in store.models() for id in store.heads(model).values()}
    victims: list[tuple[bool, int, Block]] = []
    kept: set[ManifestId] = set()
    for block, seq in store.every():
        if seq > 0 and block.header.subject is not None and block.id not in pinned:
            victims.append((block.id in heads, seq, block))
        elif block.header.body is not None:
            kept.add(block.header.body)
    victims.sort(key=lambda victim: victim[:2])
    return [block for _, _, block in victims], kept


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
