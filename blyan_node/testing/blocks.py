"""Signed blocks for tests: models, parameters, updates and releases by one author."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from protocols import limits
from protocols.dag.genesis import DEVELOPMENT
from protocols.dag.header import CHAIN_OF, Block, Header, Kind
from protocols.dag.release import encode_release
from protocols.dag.validate import kind_of
from protocols.ids import BlockId, ChunkHash, ManifestId, NetworkId, Subject, chunk_hash
from protocols.signing import Identity
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry

NOW_MS = 1_800_000_000_000


def identity(name: str) -> Identity:
    """The same key for the same name, in every test."""
    return Identity.from_seed(name.encode().ljust(32, b"\0"))


@dataclass(frozen=True)
class Made:
    """A block with all that it consists of. `body` is the concatenation of its tensors."""

    block: Block
    manifest: Manifest
    manifest_id: ManifestId
    manifest_bytes: bytes
    chunks: tuple[tuple[ChunkHash, bytes], ...]
    subjects: Mapping[Subject, BlockId] | None = None

    @property
    def id(self) -> BlockId:
        """The block's id."""
        return self.block.id


def entry(name: str, data: bytes) -> tuple[TensorEntry, list[tuple[ChunkHash, bytes]]]:
    """Bytes as one U8 tensor, with its chunks."""
    step = limits.chunk_bytes
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    chunks = [(chunk_hash(piece), piece) for piece in pieces]
    names = tuple(name for name, _ in chunks)
    return TensorEntry(name, Dtype.U8, (len(data),), len(data), names), chunks


class Author:
    """Makes the blocks of one author; `seq` and `time` count up."""

    def __init__(self, name: str, network: NetworkId = DEVELOPMENT.id) -> None:
        self.identity = identity(name)
        self.network = network
        self.seq = 0

    def make(
        self,
        kind: Kind,
        bodies: Mapping[str, bytes],
        *,
        meta: Mapping[str, str | int] | None = None,
        parents: Sequence[BlockId] = (),
        model: BlockId | None = None,
        subject: str | None = None,
        base: BlockId | None = None,
        subjects: Mapping[Subject, BlockId] | None = None,
    ) -> Made:
        """Any block, well formed or not in what its header says."""
        entries, chunks = [], []
        for name, data in bodies.items():
            made, pieces = entry(name, data)
            entries.append(made)
            chunks.extend(pieces)
        manifest = Manifest(tuple(entries))
        manifest_id, manifest_bytes = manifest.encode()
        self.seq += 1
        header = Header(
            net=self.network,
            chain=CHAIN_OF[kind],
            kind=kind,
            author=self.identity.public,
            seq=self.seq,
            time=NOW_MS + self.seq,
            depends_on=tuple(sorted({*parents, *(i for i in (model, base) if i is not None)})),
            model=model,
            subject=None if subject is None else Subject(subject),
            base=base,
            body=manifest_id,
            size=manifest.size,
            meta=dict(meta or {}),
        )
        block = Block.create(header, self.identity)
        return Made(block, manifest, manifest_id, manifest_bytes, tuple(chunks), subjects)

    def model(self, name: str = "tiny", config: bytes = b"{}") -> Made:
        """A model block."""
        return self.make(
            Kind.MODEL, {"config.json": config}, meta={"name": name, "family": "mixtral"}
        )

    def part(
        self,
        model: BlockId,
        subject: str,
        data: bytes = b"w",
        *,
        base: BlockId | None = None,
        staged: bool = True,
        parents: Sequence[BlockId] = (),
    ) -> Made:
        """Parameters of a model: of a publish if `staged`, else a single update."""
        return self.make(
            kind_of(Subject(subject)),
            {"weight": data},
            meta={"staged": 1} if staged else {},
            parents=parents,
            model=model,
            subject=subject,
            base=base,
        )

    def update(self, before: Made, data: bytes, *, parents: Sequence[BlockId] = ()) -> Made:
        """A single update of what `before` is the head of."""
        header = before.block.header
        assert header.model is not None and header.subject is not None
        return self.part(
            header.model, header.subject, data, base=before.id, staged=False, parents=parents
        )

    def release(
        self, model: BlockId, parts: Sequence[Made], *, base: BlockId | None = None
    ) -> Made:
        """A release that lists `parts` under their own subjects."""
        subjects = {p.block.header.subject: p.id for p in parts if p.block.header.subject}
        return self.make(
            Kind.RELEASE,
            {"release": encode_release(subjects)},
            model=model,
            base=base,
            subjects=subjects,
        )

    def publish(
        self, name: str = "tiny", subjects: Sequence[str] = ("embed", "layer0.expert0")
    ) -> list[Made]:
        """A whole small model: model block, parts, release; in an order that may be accepted."""
        model = self.model(name)
        parts = [self.part(model.id, s, f"{name} {s}".encode()) for s in subjects]
        return [model, *parts, self.release(model.id, parts)]
