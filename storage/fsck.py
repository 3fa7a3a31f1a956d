"""Checking a store: every row held against what it must follow from.

Blocks and manifests are held against their ids and signatures, chunks against their hashes, the
log against the blocks' own numbers, every index against the blocks that it is made from, heads
against the reference (`protocols.dag.heads.heads_of`), counters against a count, and pinned bodies
against what is stored. `storage.repair` mends what is found.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from protocols import limits
from protocols.dag.header import Block, Kind
from protocols.dag.heads import heads_of
from protocols.dag.release import encode_release, release_entry
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import BlockId, ChunkHash, ManifestId, cid_text, model_root
from protocols.tensors.manifest import Manifest
from storage import keys
from storage.blocks import accepted_rows
from storage.chunks import fault
from storage.errors import Corrupt
from storage.store import Store

Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: what kind of thing, which one, why; of which block, if of one."""

    what: str
    id: str
    why: str
    block: str | None = None


@dataclass
class Report:
    """What was looked at and what was wrong with it."""

    blocks: int = 0
    chunks: int = 0
    bad: list[Fault] = field(default_factory=list)
    bad_blocks: set[BlockId] = field(default_factory=set)
    bad_manifests: set[ManifestId] = field(default_factory=set)
    bad_chunks: set[ChunkHash] = field(default_factory=set)
    strays: list[bytes] = field(default_factory=list)  # keys in the chunk database
    unknown: list[bytes] = field(default_factory=list)  # keys in the index
    incomplete: set[BlockId] = field(default_factory=set)  # pinned, and not whole
    chain: bool = True  # whether log, indexes and heads follow from the blocks

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.bad

    def add(self, what: str, id: bytes, why: str, block: BlockId | None = None) -> None:
        """Notes a fault."""
        text = cid_text(id) if len(id) == 36 else id.hex()
        self.bad.append(Fault(what, text, why, None if block is None else cid_text(block)))

    def add_chain(self, what: str, id: bytes, why: str) -> None:
        """Notes a fault of the chain's rows, which are then built anew from the blocks."""
        self.chain = False
        self.add(what, id, why)


def check(store: Store, tell: Tell = lambda done, total, what: None) -> Report:
    """Reads everything in a store that nobody else uses; raises `Corrupt` if LevelDB cannot."""
    report = Report()
    kept = _blocks(store, report)
    manifests = _manifests(store, report)
    _check_bodies(store, report, kept, manifests)
    _check_rows(store, report, kept)
    _check_log(store, report, kept)
    if report.chain:  # heads of a chain with holes say nothing
        _check_heads(store, report)
    _check_chunks(store, report, tell)
    _check_kept(store, report, kept, manifests)
    for text, why in store.packs.faults(
        {cid_text(id): manifests[b.header.body] for id, (b, _) in kept.items()
         if b.header.body in manifests}
    ):  # fmt: skip
        report.bad.append(Fault("pack", text, why, text))
    return report


KeptBlocks = dict[BlockId, tuple[Block, int]]


def _blocks(store: Store, report: Report) -> KeptBlocks:
    """Every block that is what its id and its signature say, with its place in the log."""
    found: KeptBlocks = {}
    for key, _ in store.index.engine.iterate(keys.BLOCK.prefix()):
        id = BlockId(key[1:])
        report.blocks += 1
        try:
            kept = store.kept(id)
        except (Corrupt, LocalProtocolError) as error:
            report.bad_blocks.add(id)
            report.add_chain("block", id, str(error))
            continue
        if kept is not None and not kept.block.signature_holds():
            report.bad_blocks.add(id)
            report.add_chain("block", id, "its signature does not hold")
        elif kept is not None:
            found[id] = kept.block, kept.seq
    return found


def _manifests(store: Store, report: Report) -> dict[ManifestId | None, Manifest]:
    found: dict[ManifestId | None, Manifest] = {}
    for key, _ in store.index.engine.iterate(keys.MANIFEST.prefix()):
        id = ManifestId(key[1:])
        try:
            manifest = store.manifest(id)
        except (Corrupt, LocalProtocolError, RemoteProtocolError) as error:
            report.bad_manifests.add(id)
            report.add_chain("manifest", id, str(error))
            continue
        if manifest is not None:
            found[id] = manifest
    return found


def _check_bodies(
    store: Store,
    report: Report,
    kept: KeptBlocks,
    manifests: dict[ManifestId | None, Manifest],
) -> None:
    """Each block's manifest is here and as long as it says; releases list what their body says."""
    for id, (block, seq) in kept.items():
        manifest = manifests.get(block.header.body)
        if manifest is None:
            report.add_chain("block", id, "its manifest is not here or is damaged")
        elif manifest.size != block.header.size:
            report.add_chain("block", id, "its manifest has another size")
        elif block.header.kind is Kind.RELEASE and seq > 0 and not _lists(store, id, manifest):
            report.add_chain("release", id, "what it lists is not here or is damaged")


def _lists(store: Store, release: BlockId, manifest: Manifest) -> bool:
    """Whether the kept subjects of a release are the body that its manifest describes."""
    try:
        subjects = store.release_subjects(release)
        entry = release_entry(manifest)
    except RemoteProtocolError:
        return False
    data = b"" if subjects is None else encode_release(subjects)
    pieces = range(0, len(data), limits.chunk_bytes)
    hashes = tuple(hashlib.sha256(data[at : at + limits.chunk_bytes]).digest() for at in pieces)
    return hashes == entry.chunks


def _check_rows(store: Store, report: Report, kept: KeptBlocks) -> None:
    """The indexes have the rows that follow from the blocks, and no others."""
    expected: set[bytes] = set()
    seqs: dict[bytes, int] = {}
    for id, (block, seq) in kept.items():
        author = block.header.author
        seqs[author] = max(seqs.get(author, 0), block.header.seq)
        if seq > 0:
            expected.update(key for key, _ in accepted_rows(block, seq))
        else:
            expected.add(keys.STAGED.key(block.header.model or id, id))
    made = (keys.MODEL, keys.SUCCESSOR, keys.RELEASE, keys.STAGED, keys.LOG)
    tags = {family.tag for family in made}
    known = {family.tag for family in keys.INDEX_FAMILIES}
    actual: set[bytes] = set()
    for tag in sorted(tags):
        actual.update(key for key, _ in store.index.engine.iterate(tag))
    for key in actual ^ {key for key in expected if key[:1] in tags}:
        why = "is missing" if key in expected else "follows from no block"
        report.add_chain("index", key, f"this row {why}")
    for key in _others(store, known):
        report.unknown.append(key)
        report.add("index", key[:64], "a row that this program does not know")
    for author_key, seq in seqs.items():
        if store.author_seq(author_key) < seq:  # type: ignore[arg-type]
            report.add_chain("index", author_key, "the author has used larger numbers")


def _others(store: Store, known: set[bytes]) -> Iterator[bytes]:
    """Keys of the index that belong to no family."""
    singles = {keys.SCHEMA_KEY, keys.COUNTERS_KEY}
    for first in range(256):
        tag = bytes((first,))
        if tag not in known:
            rows = store.index.engine.iterate(tag)
            yield from (key for key, _ in rows if key not in singles)


def _check_log(store: Store, report: Report, kept: KeptBlocks) -> None:
    """The log counts from 1 without a gap, agrees with the blocks, and has parents first."""
    accepted = {id: seq for id, (_, seq) in kept.items() if seq > 0}
    last = 0
    for key, id in store.index.engine.iterate(keys.LOG.prefix()):
        last += 1
        seq = keys.LOG.parse(key).seq
        if seq != last or accepted.get(BlockId(id)) != seq:
            report.add_chain("log", id, f"entry {seq} does not fit")
            last = seq
    for id, seq in accepted.items():
        for parent in kept[id][0].header.depends_on:
            if not 0 < accepted.get(parent, 0) < seq:
                report.add_chain("log", id, "a parent does not come before it")
    counters = store.index.counters
    if (counters.log, counters.staged) != (len(accepted), len(kept) - len(accepted)):
        report.add_chain("index", b"#", "the counts of blocks are wrong")


def _check_heads(store: Store, report: Report) -> None:
    """Current heads equal the reference, and every root that is to be findable is."""
    for model in store.models():
        whole = heads_of(model, store)
        expected = {} if whole is None else whole.heads
        current = {
            keys.unpack_subject(keys.HEAD.parse(key).subject): id
            for key, id in store.index.engine.iterate(keys.HEAD.prefix(model))
        }
        if current != expected or dict(store.heads(model)) != expected:
            report.add_chain("heads", model, "they do not follow from the blocks")
            continue
        lists = [store.release_subjects(release) for release in store.releases(model)]
        for heads in (expected, *lists):
            root = model_root(model, heads or {})
            at = store.heads_at(root)
            if heads and (at is None or dict(at.heads) != dict(heads)):
                report.add_chain("root", root, "it does not resolve")


def _check_chunks(store: Store, report: Report, tell: Tell) -> None:
    """Every chunk that the index knows has its bytes, and no bytes are there beside."""
    total = store.index.counters.chunks
    size = 0
    places: set[bytes] = set()
    for key, value in store.index.engine.iterate(keys.CHUNK.prefix()):
        name = ChunkHash(keys.CHUNK.parse(key).hash)
        seq, expected = keys.CHUNK_VALUE.unpack(value)
        report.chunks += 1
        size += expected
        tell(report.chunks, total, "chunks")
        place = keys.DATA.key(seq, name)
        places.add(place)
        why = _fault(store, place, name, expected)
        if why is not None:
            report.bad_chunks.add(name)
            report.add("chunk", name, why)
    for key in _stray_keys(store, places):
        report.strays.append(key)
        report.add("chunk", key[-32:], "bytes that the index does not know")
    counters = store.index.counters
    if (counters.chunks, counters.chunk_bytes) != (report.chunks, size):
        report.add("index", b"#", "the counts of chunks are wrong")


def _fault(store: Store, place: bytes, name: ChunkHash, size: int) -> str | None:
    try:
        return fault(name, size, store.chunks.data.get(place))
    except Corrupt as error:
        return error.why


def _stray_keys(store: Store, places: set[bytes]) -> Iterable[bytes]:
    try:
        return [k for k, _ in store.chunks.data.iterate(keys.DATA.prefix()) if k not in places]
    except Corrupt:  # the chunk that cannot be read is reported already
        return []


def _check_kept(
    store: Store,
    report: Report,
    kept: KeptBlocks,
    manifests: dict[ManifestId | None, Manifest],
) -> None:
    """What is pinned is whole or known to be wanted; no block consists of damaged chunks."""
    pinned = {id for id, _ in store.pins.every()} - set(store.wanted())
    for id in sorted(pinned - kept.keys()):
        report.incomplete.add(id)
        report.add("block", id, "it is to be kept and is not here", id)
    for id, (block, _) in kept.items():
        manifest = manifests.get(block.header.body)
        names = {name for name, _ in manifest.chunks()} if manifest else set()
        subject = block.header.subject or block.header.kind
        damaged = len(names & report.bad_chunks)
        missing = sum(name not in store.chunks for name in names)
        if id in pinned and (missing or damaged):
            report.incomplete.add(id)
        if damaged:
            report.add("block", id, f"{subject}: {damaged} of its chunks are damaged", id)
        elif id in pinned and missing:
            report.add("block", id, f"{subject}: {missing} of its chunks are not here", id)
