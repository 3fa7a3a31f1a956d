"""Chains to measure with: signed headers of one author, all of which validate."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from protocols.dag.genesis import DEVELOPMENT
from protocols.dag.header import CHAIN_OF, Block, Header, Kind
from protocols.dag.release import ENTRY, encode_release
from protocols.dag.validate import kind_of
from protocols.ids import BlockId, ManifestId, Subject, chunk_hash, expert_subject
from protocols.signing import Identity
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry

NOW_MS = 1_800_000_000_000
EXPERTS_PER_LAYER = 32


@dataclass
class Author:
    """Makes the blocks of a model whose bodies are all alike and a few bytes long."""

    identity: Identity = field(default_factory=lambda: Identity.from_seed(b"bench".ljust(32)))
    manifests: dict[ManifestId, bytes] = field(default_factory=dict)
    seq: int = 0

    def model(self) -> Block:
        """The model block."""
        return self._block(Kind.MODEL, meta={"name": "bench", "family": "mixtral"})

    def parts(self, model: BlockId, count: int) -> list[Block]:
        """The first version of `count` experts, waiting for their release."""
        names = (expert_subject(*divmod(n, EXPERTS_PER_LAYER)) for n in range(count))
        return [self._part(model, name, None) for name in names]

    def release(self, model: BlockId, parts: list[Block]) -> Block:
        """The release of `parts`."""
        subjects = {part.header.subject: part.id for part in parts if part.header.subject}
        body = encode_release(subjects)
        return self._block(Kind.RELEASE, model=model, body=(ENTRY, body))

    def updates(self, parts: list[Block]) -> Iterator[Block]:
        """Updates without end: each part in turn gets a successor, and that one again."""
        heads = list(parts)
        while True:
            for place, head in enumerate(heads):
                model, subject = head.header.model, head.header.subject
                assert model is not None and subject is not None
                heads[place] = self._part(model, subject, head.id)
                yield heads[place]

    def _part(self, model: BlockId, subject: Subject, base: BlockId | None) -> Block:
        meta: dict[str, str | int] = {"staged": 1} if base is None else {}
        return self._block(kind_of(subject), model=model, subject=subject, base=base, meta=meta)

    def _block(
        self,
        kind: Kind,
        *,
        model: BlockId | None = None,
        subject: Subject | None = None,
        base: BlockId | None = None,
        body: tuple[str, bytes] = ("weight", b"w"),
        meta: dict[str, str | int] | None = None,
    ) -> Block:
        name, data = body
        entry = TensorEntry(name, Dtype.U8, (len(data),), len(data), (chunk_hash(data),))
        id, self.manifests[id] = Manifest((entry,)).encode()
        self.seq += 1
        header = Header(
            net=DEVELOPMENT.id,
            chain=CHAIN_OF[kind],
            kind=kind,
            author=self.identity.public,
            seq=self.seq,
            time=NOW_MS,
            depends_on=tuple(sorted(id for id in (model, base) if id is not None)),
            model=model,
            subject=subject,
            base=base,
            body=id,
            size=len(data),
            meta=meta or {},
        )
        return Block.create(header, self.identity)
