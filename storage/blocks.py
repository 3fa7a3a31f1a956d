"""Blocks: headers, manifests, the acceptance log, and the indexes that the rules of the DAG read.

A block is *staged* (kept, waiting for the release that lists it) or *accepted* (numbered in the
log, in the indexes). Each change is one durable atomic batch, so after a crash a block is in one of
the two states with all its rows, or not here at all. No batch grows with the number of blocks.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from protocols.dag.header import Block, Kind
from protocols.dag.release import decode_release, encode_release
from protocols.errors import RemoteProtocolError
from protocols.ids import (
    BlockId,
    ManifestId,
    PublicKey,
    Subject,
    cid,
    cid_text,
)
from protocols.tensors.manifest import Manifest
from storage import keys
from storage.engine import Row
from storage.errors import Corrupt
from storage.heads import HeadRows, ModelHeads, release_root_row
from storage.index import Index
from storage.pins import Pin

ManifestRow = tuple[ManifestId, bytes]
Releases = Mapping[BlockId, Mapping[Subject, BlockId]]


class Kept(NamedTuple):
    """A block as it is stored; `seq` is its place in the log, 0 while it is staged."""

    block: Block
    seq: int


class Blocks:
    """The chain as one node keeps it: a `protocols.dag.view.ChainView` that can be added to."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._engine = index.engine
        self._heads = HeadRows(index)

    # Reading

    def kept(self, id: BlockId) -> Kept | None:
        """The block and its place in the log; None if it is not here. Raises `Corrupt`."""
        value = self._engine.get(keys.BLOCK.key(id))
        return None if value is None else read_block(id, value)

    def block(self, id: BlockId, /) -> Block | None:
        """The block, accepted or staged; None if it is not here. Raises `Corrupt`."""
        kept = self.kept(id)
        return None if kept is None else kept.block

    def is_accepted(self, id: BlockId, /) -> bool:
        """Whether the block is in the log."""
        value = self._engine.get(keys.BLOCK.key(id))
        return value is not None and read_seq(id, value) > 0

    def manifest(self, id: ManifestId, /) -> Manifest | None:
        """A manifest, checked against its id; None if it is not here. Raises `Corrupt`."""
        data = self.manifest_bytes(id)
        return None if data is None else Manifest.decode(data)

    def manifest_bytes(self, id: ManifestId) -> bytes | None:
        """The canonical bytes of a manifest, checked; None if it is not here."""
        data = self._engine.get(keys.MANIFEST.key(id))
        if data is not None and cid(data) != id:
            raise Corrupt(f"manifest {cid_text(id)} is damaged", "its bytes do not have its id")
        return data

    def release_subjects(self, release: BlockId, /) -> Mapping[Subject, BlockId] | None:
        """What a release lists; None while its body is not here."""
        data = self._engine.get(keys.SUBJECTS.key(release))
        return None if data is None else decode_release(data)

    def releases(self, model: BlockId, /) -> Sequence[BlockId]:
        """The accepted releases of a model, smallest id first."""
        rows = self._engine.iterate(keys.RELEASE.prefix(model))
        return [BlockId(keys.RELEASE.parse(key).id) for key, _ in rows]

    def successors(self, base: BlockId, /) -> Sequence[BlockId]:
        """The accepted blocks that replace `base`, smallest id first."""
        rows = self._engine.iterate(keys.SUCCESSOR.prefix(base))
        return [BlockId(keys.SUCCESSOR.parse(key).id) for key, _ in rows]

    def models(self) -> Sequence[BlockId]:
        """The accepted model blocks, smallest id first."""
        rows = self._engine.iterate(keys.MODEL.prefix())
        return [BlockId(keys.MODEL.parse(key).id) for key, _ in rows]

    def staged(self, model: BlockId) -> list[BlockId]:
        """The staged blocks of a model, smallest id first."""
        rows = self._engine.iterate(keys.STAGED.prefix(model))
        return [BlockId(keys.STAGED.parse(key).id) for key, _ in rows]

    def staged_models(self) -> list[BlockId]:
        """The model blocks that wait for their first release, smallest id first."""
        rows = (keys.STAGED.parse(key) for key, _ in self._engine.iterate(keys.STAGED.prefix()))
        return [BlockId(row.id) for row in rows if row.of == row.id]

    def heads(self, model: BlockId, /) -> Mapping[Subject, BlockId]:
        """The current block of each subject of a model; empty if the model has no release."""
        return self._heads.current(model)

    def heads_at(self, root: bytes) -> ModelHeads | None:
        """The model and the heads that a root names; None if the root was never one here."""
        value = self._engine.get(keys.ROOT.key(root))
        if value is None:
            return None
        model, version, release = keys.ROOT_VALUE.unpack(value)
        if release == bytes(len(release)):
            return ModelHeads(BlockId(model), self._heads.at_version(model, version))
        subjects = self.release_subjects(BlockId(release))
        return None if subjects is None else ModelHeads(BlockId(model), dict(subjects))

    def log(self, after: int, limit: int) -> list[tuple[int, BlockId]]:
        """Up to `limit` entries of the acceptance log behind number `after`, in order."""
        found: list[tuple[int, BlockId]] = []
        if limit > 0:
            for key, id in self._engine.iterate(keys.LOG.prefix(), start=keys.LOG.key(after + 1)):
                found.append((keys.LOG.parse(key).seq, BlockId(id)))
                if len(found) == limit:
                    break
        return found

    def every(self) -> Iterator[Kept]:
        """Every block, in order of ids."""
        for key, value in self._engine.iterate(keys.BLOCK.prefix()):
            yield read_block(BlockId(keys.BLOCK.parse(key).id), value)

    def author_seq(self, author: PublicKey) -> int:
        """The largest `seq` that was seen in a block of this author; 0 if there is none."""
        value = self._engine.get(keys.AUTHOR.key(author))
        return 0 if value is None else int(keys.NUMBER.unpack(value)[0])

    # Writing

    def stage(
        self,
        blocks: Sequence[Block],
        manifests: Iterable[ManifestRow] = (),
        *,
        release_subjects: Releases | None = None,
        sync: bool = True,
    ) -> None:
        """Keeps blocks without accepting them; those that are here already are left alone.

        Without `sync`, what a peer would send again is durable with the next write that syncs.
        """
        with self._index.lock:
            new = {b.id: b for b in blocks if self._engine.get(keys.BLOCK.key(b.id)) is None}
            rows: list[Row] = []
            for block in new.values():
                rows.append((keys.BLOCK.key(block.id), pack_block(block, 0)))
                rows.append((keys.STAGED.key(block.header.model or block.id, block.id), b""))
            rows += self._bodies(new.values(), manifests, release_subjects or {})
            counters = self._index.counters
            after = counters._replace(staged=counters.staged + len(new))
            self._index.commit(rows, counters=after, sync=sync)

    def unstage(self, ids: Sequence[BlockId]) -> None:
        """Forgets staged blocks, with their pins and the manifests that no other block names.

        Their chunks are left to the garbage collector.
        """
        with self._index.lock:
            gone = [kept.block for id in ids if (kept := self.kept(id)) and kept.seq == 0]
            deletes = [keys.BLOCK.key(b.id) for b in gone]
            deletes += [keys.STAGED.key(b.header.model or b.id, b.id) for b in gone]
            deletes += [keys.SUBJECTS.key(b.id) for b in gone if b.header.kind is Kind.RELEASE]
            deletes += [keys.PIN.key(b.id, reason) for b in gone for reason in Pin]
            deletes += [keys.MANIFEST.key(body) for body in self._named_by_none_but(gone)]
            counters = self._index.counters
            after = counters._replace(staged=counters.staged - len(gone))
            self._index.commit([], deletes, counters=after)

    def accept(
        self,
        blocks: Sequence[Block],
        manifests: Iterable[ManifestRow] = (),
        *,
        release_subjects: Releases | None = None,
        heads: Mapping[BlockId, tuple[Mapping[Subject, BlockId], bytes]] | None = None,
    ) -> None:
        """Appends blocks to the log, parents first, with everything that follows from them.

        `heads` are the heads and the root, after these blocks, of each model that they change.
        Blocks that are accepted already are left alone; staged ones move from staged to accepted.
        After a crash either all of this is here or none of it.
        """
        with self._index.lock:
            rows: list[Row] = []
            deletes: list[bytes] = []
            fresh: list[Block] = []
            counters = self._index.counters
            for block in {block.id: block for block in blocks}.values():
                kept = self.kept(block.id)
                if kept is not None and kept.seq > 0:
                    continue
                if kept is not None:
                    deletes.append(keys.STAGED.key(block.header.model or block.id, block.id))
                    counters = counters._replace(staged=counters.staged - 1)
                fresh.append(block)
                counters = counters._replace(log=counters.log + 1)
                rows += accepted_rows(block, counters.log)
            rows += self._bodies(fresh, manifests, release_subjects or {})
            changes = self._heads.change(heads or {}, counters.log)
            rows += changes.puts
            rows += self._release_roots(fresh, release_subjects or {})
            self._index.commit(rows, [*deletes, *changes.deletes], counters=counters)
            self._heads.changed(heads or {})

    def _bodies(
        self, blocks: Iterable[Block], manifests: Iterable[ManifestRow], releases: Releases
    ) -> list[Row]:
        """The rows of manifests and release bodies, and what is known of each author."""
        rows = [(keys.MANIFEST.key(id), data) for id, data in manifests]
        rows += [(keys.SUBJECTS.key(id), encode_release(to)) for id, to in releases.items()]
        seqs: dict[PublicKey, int] = {}
        for block in blocks:
            author = block.header.author
            known = seqs.get(author) or self.author_seq(author)
            seqs[author] = max(known, block.header.seq)
        return rows + [(keys.AUTHOR.key(a), keys.NUMBER.pack(seq)) for a, seq in seqs.items()]

    def _named_by_none_but(self, gone: Sequence[Block]) -> set[ManifestId]:
        """The manifests of these blocks that no other block here names."""
        ids = {block.id for block in gone}
        bodies = {block.header.body for block in gone if block.header.body is not None}
        if bodies:
            bodies -= {kept.block.header.body for kept in self.every() if kept.block.id not in ids}
        return bodies

    def _release_roots(self, blocks: Sequence[Block], releases: Releases) -> Iterator[Row]:
        for block in blocks:
            if block.header.kind is Kind.RELEASE and block.header.model is not None:
                subjects = releases.get(block.id) or self.release_subjects(block.id)
                if subjects is not None:
                    yield release_root_row(block.header.model, block.id, subjects)


def pack_block(block: Block, seq: int) -> bytes:
    """The stored form of a block."""
    rest = keys.NUMBER.pack(seq) + block.encode()
    return zlib.crc32(rest).to_bytes(4, "big") + rest


def read_block(id: BlockId, value: bytes) -> Kept:
    """The inverse of `pack_block`; raises `Corrupt` if any bit of it has changed."""
    seq = read_seq(id, value)
    try:
        block = Block.decode(memoryview(value)[keys.BLOCK_VALUE.size :])
    except RemoteProtocolError as error:
        raise _damaged(id, str(error)) from None
    if block.id != id:
        raise _damaged(id, "its bytes do not have its id")
    return Kept(block, seq)


def read_seq(id: BlockId, value: bytes) -> int:
    """A stored block's place in the log; raises `Corrupt` if the checksum does not hold."""
    if len(value) < keys.BLOCK_VALUE.size:
        raise _damaged(id, "it is cut short")
    crc, seq = keys.BLOCK_VALUE.unpack_from(value)
    if zlib.crc32(memoryview(value)[4:]) != crc:
        raise _damaged(id, "its checksum does not hold")
    return int(seq)


def _damaged(id: BlockId, why: str) -> Corrupt:
    return Corrupt(f"block {cid_text(id)} is damaged", why, block=cid_text(id))


def accepted_rows(block: Block, seq: int) -> list[Row]:
    """What an accepted block adds to the indexes, besides heads."""
    header = block.header
    rows = [(keys.BLOCK.key(block.id), pack_block(block, seq)), (keys.LOG.key(seq), block.id)]
    if header.kind is Kind.MODEL:
        rows.append((keys.MODEL.key(block.id), b""))
    if header.kind is Kind.RELEASE and header.model is not None:
        rows.append((keys.RELEASE.key(header.model, block.id), b""))
    if header.base is not None:
        rows.append((keys.SUCCESSOR.key(header.base, block.id), b""))
    return rows
