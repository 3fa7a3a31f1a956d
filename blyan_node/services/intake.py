"""Where blocks enter: decided about, written, and those that waited for them decided about again.

Blocking; `Chain` calls it on one thread. Whatever a peer sends, an intake stays bounded: what is
parked lives in the orphan pool with a share for each source, and what is staged for a release that
never comes is counted by source and dropped when it is over its bound.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from protocols import limits
from protocols.dag.admission import Accepted, Admission, Duplicate, Parked, Staged, admit
from protocols.dag.header import Block, Kind
from protocols.dag.orphans import Orphan, OrphanPool
from protocols.dag.release import decode_release, release_entry
from protocols.dag.view import Overlay
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ManifestId
from protocols.tensors.manifest import Manifest
from storage.store import Store

LEFT_OVER = "an earlier run"  # the source of what was staged before this process began
OURSELVES = ""


class Outcome(msgspec.Struct, frozen=True):
    """What became of one block; `verdict` is an error if it can never be accepted."""

    block: Block
    source: str
    verdict: Admission | RemoteProtocolError

    @property
    def accepted(self) -> bool:
        """Whether the block counts now (or did before)."""
        return isinstance(self.verdict, Accepted | Duplicate)


@dataclass(slots=True)
class _Staged:
    """What one source has staged: bytes of header and manifest by block."""

    blocks: dict[BlockId, int] = field(default_factory=dict)
    bytes: int = 0


class StagedBySource:
    """Who staged what, so that nobody fills the store with publishes that never end."""

    def __init__(self) -> None:
        self._of: dict[str, _Staged] = {}
        self._source: dict[BlockId, str] = {}
        self.bytes = 0

    def add(self, block: BlockId, size: int, source: str) -> None:
        """Counts a staged block against its source."""
        if block not in self._source:
            self._source[block] = source
            of = self._of.pop(source, None) or _Staged()
            self._of[source] = of  # the newest is last
            of.blocks[block] = size
            of.bytes += size
            self.bytes += size

    def remove(self, block: BlockId) -> None:
        """The block is staged no more."""
        if (source := self._source.pop(block, None)) is not None:
            of = self._of[source]
            size = of.blocks.pop(block)
            of.bytes -= size
            self.bytes -= size
            if not of.blocks:
                del self._of[source]

    def over(self, source: str) -> bool:
        """Whether a source has more than its share."""
        of = self._of.get(source)
        return of is not None and (
            len(of.blocks) > limits.staged_blocks_per_peer_max
            or of.bytes > limits.staged_bytes_per_peer_max
        )

    def stalest(self) -> str | None:
        """The source (not ourselves) that has staged nothing for longest."""
        return next((source for source in self._of if source != OURSELVES), None)

    def forget(self, source: str) -> list[BlockId]:
        """Takes out all that a source has staged."""
        gone = list(self._of[source].blocks) if source in self._of else []
        for block in gone:
            self.remove(block)
        return gone


class Intake:
    """Decides about blocks and writes what follows. One caller at a time."""

    def __init__(self, store: Store, pool: OrphanPool | None = None) -> None:
        self._store = store
        self.pool = pool or OrphanPool()
        self._staged = StagedBySource()
        for model in store.staged_models():
            self._count_left_over(store.staged(model))
        for model in store.models():
            self._count_left_over(store.staged(model))

    def take(
        self,
        blocks: Sequence[Block],
        manifests: Mapping[ManifestId, tuple[Manifest, bytes]],
        source: str,
    ) -> list[Outcome]:
        """Decides about `blocks` in their order, then about those that waited for them.

        The blocks have passed the stages of `decode_block`, the manifests are what their ids say.
        The outcomes of `blocks` come first, in their order.
        """
        session = _Session(self._store, manifests)
        waiting = deque(Orphan(block, source) for block in blocks)
        outcomes: list[Outcome] = []
        while waiting:
            orphan = waiting.popleft()
            outcome = self._decide(orphan, session)
            outcomes.append(outcome)
            if self.pool:
                waiting.extend(self.pool.arrived(_arrived(outcome)))
        session.write_staged()
        return outcomes

    def forget(self, block: Block) -> None:
        """Drops a staged block that turned out to be bad."""
        self.pool.remove(block.id)
        self._staged.remove(block.id)
        self._store.unstage([block.id])

    def _decide(self, orphan: Orphan, session: "_Session") -> Outcome:
        block, source = orphan.block, orphan.source
        if orphan.manifest is not None and block.header.body is not None:
            session.add_manifest(block.header.body, orphan.manifest)
        try:
            verdict = admit(block, session.view)
            match verdict:
                case Accepted():
                    session.accept(verdict)
                    for entered in verdict.blocks:
                        self._staged.remove(entered.id)
                case Staged():
                    self._stage(block, session, source)
                case Parked():
                    self._park(verdict, session, source)
        except RemoteProtocolError as error:
            return Outcome(block, source, error)
        return Outcome(block, source, verdict)

    def _park(self, parked: Parked, session: "_Session", source: str) -> None:
        """Keeps what cannot be decided yet.

        A release by the model's author is staged, so that its manifest and its body stay while
        what it lists is fetched.
        """
        block = parked.block
        model = None if block.header.model is None else session.view.block(block.header.model)
        if block.header.kind is Kind.RELEASE and model is not None and not parked.manifests:
            if session.view.block(block.id) is None:
                self._stage(block, session, source)
            self.pool.add(parked, source)
        else:
            self.pool.add(parked, source, session.manifest_bytes(block))

    def _stage(self, block: Block, session: "_Session", source: str) -> None:
        size = session.stage(block)
        self._staged.add(block.id, size, source)
        if source == OURSELVES:
            return
        if self._staged.over(source):
            session.unstage(self._staged.forget(source))
            raise RemoteProtocolError("block/release", "too many blocks without their release")
        while (
            session.staged_count > limits.staged_blocks_max
            or self._staged.bytes > limits.staged_bytes_max
        ) and (old := self._staged.stalest()):
            session.unstage(self._staged.forget(old))

    def _count_left_over(self, ids: Iterable[BlockId]) -> None:
        for id in ids:
            block = self._store.block(id)
            if block is not None and block.header.body is not None:
                manifest = self._store.manifest_bytes(block.header.body)
                self._staged.add(id, len(block.raw) + len(manifest or b""), LEFT_OVER)


class _Session:
    """What one `take` sees: the store, and over it what is not written yet."""

    def __init__(
        self, store: Store, manifests: Mapping[ManifestId, tuple[Manifest, bytes]]
    ) -> None:
        self._store = store
        self._raw = {id: data for id, (_, data) in manifests.items()}
        self.view = Overlay(store)
        for id, (manifest, _) in manifests.items():
            self.view.add_manifest(id, manifest)
        self._unwritten: dict[BlockId, Block] = {}

    @property
    def staged_count(self) -> int:
        return self._store.index.counters.staged + len(self._unwritten)

    def add_manifest(self, id: ManifestId, data: bytes) -> None:
        self._raw[id] = data
        self.view.add_manifest(id, Manifest.decode(data))

    def manifest_bytes(self, block: Block) -> bytes | None:
        """The manifest that came with the block, if it is not in the store."""
        return None if block.header.body is None else self._raw.get(block.header.body)

    def stage(self, block: Block) -> int:
        """Stages a block, to be written with others; its bytes with its manifest."""
        self._unwritten[block.id] = block
        self.view.stage(block)
        return len(block.raw) + len(self.manifest_bytes(block) or b"")

    def unstage(self, ids: Sequence[BlockId]) -> None:
        self.write_staged()
        self._store.unstage(ids)
        for id in ids:
            self.view.unstage(id)

    def write_staged(self) -> None:
        """One batch: the staged blocks with their manifests."""
        if self._unwritten:
            blocks = list(self._unwritten.values())
            self._store.stage(blocks, self._rows(blocks), sync=False)
            self._unwritten.clear()

    def accept(self, accepted: Accepted) -> None:
        """One batch: everything that takes effect together. What was staged is written first."""
        self.write_staged()
        blocks = accepted.blocks
        last = blocks[-1]
        listed = {} if accepted.subjects is None else {last.id: accepted.subjects}
        heads = {accepted.model: (accepted.heads, accepted.root)}
        self._store.accept(blocks, self._rows(blocks), release_subjects=listed, heads=heads)

    def _rows(self, blocks: Iterable[Block]) -> list[tuple[ManifestId, bytes]]:
        ids = {block.header.body for block in blocks}
        return [(id, self._raw[id]) for id in ids if id is not None and id in self._raw]


def read_release(store: Store, release: Block) -> None:
    """Reads the body of a staged release out of its chunks, and keeps what it lists.

    Raises `RemoteProtocolError` if it is malformed, `BlockMissing` if a chunk is not here.
    """
    _, manifest = store.body(release.id)
    entry = release_entry(manifest)
    subjects = decode_release(b"".join(store.read_tensor(release, entry)))
    store.stage([], release_subjects={release.id: subjects})


def _arrived(outcome: Outcome) -> list[bytes]:
    match outcome.verdict:
        case Accepted(blocks=blocks):
            return [id for b in blocks for id in (b.id, b.header.body) if id is not None]
        case Staged(block=block):
            return [id for id in (block.id, block.header.body) if id is not None]
        case _:
            return []
