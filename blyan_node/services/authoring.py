"""Making blocks of one's own: bodies into chunks, headers signed and staged.

An `Author` belongs to one node. Its calls block and are made from one thread at a time, under the
`authoring` limiter of the services that use it: the author's blocks are numbered one after another.
Who reads heads to make blocks that replace them holds the author's `turn` until these are accepted.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from protocols.dag.header import CHAIN_OF, Block, Header, Kind
from protocols.errors import LocalProtocolError
from protocols.ids import BlockId, ManifestId, NetworkId, Subject, cid_text
from protocols.signing import Identity
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry
from storage.blocks import ManifestRow
from storage.store import Store

ClockMs = Callable[[], int]
Pieces = Iterable[bytes | memoryview]


class Submits(Protocol):
    """Takes finished blocks into the chain; `blyan_node.services.chain.Chain` is it."""

    async def submit(
        self, blocks: Sequence[Block], manifests: Sequence[ManifestRow], source: None
    ) -> object:
        """Decides about blocks of our own and announces what is accepted."""


class Sink(Protocol):
    """Where a draft's chunks and blocks go; counts bytes that are new and that were there."""

    new_bytes: int
    reused_bytes: int

    def write_tensor(
        self, name: str, dtype: Dtype, shape: tuple[int, ...], pieces: Iterable[bytes | memoryview]
    ) -> TensorEntry:
        """Takes the bytes of a tensor."""

    def stage(self, block: Block, manifest_id: ManifestId, manifest: bytes) -> None:
        """Takes a block whose tensors it has taken."""

    def flush(self) -> None:
        """Returns when everything so far is stored and counted."""


@dataclass(frozen=True)
class Body:
    """A manifest in both forms, once its chunks are on their way into the store."""

    manifest: Manifest
    id: ManifestId
    data: bytes

    @classmethod
    def of(cls, entries: Iterable[TensorEntry]) -> "Body":
        """The body that consists of these tensors."""
        manifest = Manifest(tuple(entries))
        id, data = manifest.encode()
        return cls(manifest, id, data)

    @property
    def row(self) -> ManifestRow:
        """What the store keeps of it."""
        return self.id, self.data


@dataclass(frozen=True)
class Place:
    """Where a block goes: what it is of, and what it replaces."""

    kind: Kind
    model: BlockId | None = None
    subject: Subject | None = None
    base: BlockId | None = None
    meta: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def parents(self) -> tuple[BlockId, ...]:
        """The blocks that it depends on, sorted."""
        return tuple(sorted({id for id in (self.model, self.base) if id is not None}))


class Author:
    """Signs blocks with the node's key for its network. `turn` is held from heads to acceptance."""

    def __init__(
        self, store: Store, identity: Identity, network: NetworkId, clock_ms: ClockMs
    ) -> None:
        self.identity = identity
        self.turn = trio.Lock()
        self._store = store
        self._network = network
        self._clock_ms = clock_ms
        self._seq = 0

    def apart(self) -> "Author":
        """The same author for a dry run: what it signs uses up no number of this one's."""
        return Author(self._store, self.identity, self._network, self._clock_ms)

    def block(self, place: Place, body: Body) -> Block:
        """The next block of this author."""
        public = self.identity.public
        self._seq = max(self._seq, self._store.author_seq(public)) + 1
        header = Header(
            net=self._network,
            chain=CHAIN_OF[place.kind],
            kind=place.kind,
            author=public,
            seq=self._seq,
            time=self._clock_ms(),
            depends_on=place.parents,
            model=place.model,
            subject=place.subject,
            base=place.base,
            body=body.id,
            size=body.manifest.size,
            meta=dict(place.meta),
        )
        return Block.create(header, self.identity)


def write_files(sink: Sink, files: Mapping[str, bytes]) -> Body:
    """Small files as a body of U8 tensors named by file name."""
    return Body.of(
        sink.write_tensor(name, Dtype.U8, (len(data),), (data,))
        for name, data in sorted(files.items())
    )


def require_accepted(store: Store, block: Block) -> None:
    """Makes sure that a block of our own took effect; that it did not would be our bug."""
    if not store.is_accepted(block.id):
        raise LocalProtocolError(
            f"our own {block.header.kind} {cid_text(block.id)} was not accepted"
        )
