"""What the rules of the DAG read: the blocks that are here, and which of them are accepted.

A block that is here is in one of two states. *Staged*: its header and manifest are kept, and it
waits for a release to list it (`protocols.dag.admission.waits_for_release`); the body of a release
that is not accepted yet may be here as well. *Accepted*: it is in the log, in the indexes, and
counts for heads.

`ChainView` is implemented by the store; `Overlay` lays blocks that are not written yet over a view,
so that one decision about a batch needs no write; `MemoryView` is the plain twin for tests.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from protocols.dag.header import Block, Kind
from protocols.ids import BlockId, ManifestId, Subject
from protocols.tensors.manifest import Manifest


class ChainView(Protocol):
    """A read-only picture of the chain. Sequences come in any order unless it is said."""

    def block(self, id: BlockId, /) -> Block | None:
        """The block, accepted or staged; None if it is not here."""

    def is_accepted(self, id: BlockId, /) -> bool:
        """Whether the block is here and accepted."""

    def manifest(self, id: ManifestId, /) -> Manifest | None:
        """The manifest, None if it is not here. Every staged or accepted block's is here."""

    def release_subjects(self, release: BlockId, /) -> Mapping[Subject, BlockId] | None:
        """What a release lists, accepted or staged; None while its body is not here."""

    def releases(self, model: BlockId, /) -> Sequence[BlockId]:
        """The accepted releases of a model."""

    def successors(self, base: BlockId, /) -> Sequence[BlockId]:
        """The accepted blocks (parameters or releases) whose `base` is this one."""

    def heads(self, model: BlockId, /) -> Mapping[Subject, BlockId]:
        """The current heads as they were kept at the last acceptance; empty if unknown."""

    def models(self) -> Sequence[BlockId]:
        """The accepted model blocks."""


class MemoryView:
    """A `ChainView` in dictionaries: what a store does, without a store."""

    def __init__(self) -> None:
        self.blocks: dict[BlockId, Block] = {}
        self.manifests: dict[ManifestId, Manifest] = {}
        self.bodies: dict[BlockId, Mapping[Subject, BlockId]] = {}
        self.log: list[BlockId] = []
        self._accepted: set[BlockId] = set()
        self._by_base: dict[BlockId, list[BlockId]] = {}
        self._releases: dict[BlockId, list[BlockId]] = {}
        self._heads: dict[BlockId, Mapping[Subject, BlockId]] = {}

    def stage(self, block: Block) -> None:
        """Keeps a block without accepting it."""
        self.blocks[block.id] = block

    def accept(
        self, blocks: Iterable[Block], heads: Mapping[BlockId, Mapping[Subject, BlockId]]
    ) -> None:
        """Appends blocks to the log, parents first, and replaces the heads of their models."""
        for block in blocks:
            assert block.id not in self._accepted
            self.blocks[block.id] = block
            self._accepted.add(block.id)
            self.log.append(block.id)
            if block.header.base is not None:
                self._by_base.setdefault(block.header.base, []).append(block.id)
            if block.header.kind is Kind.RELEASE and block.header.model is not None:
                self._releases.setdefault(block.header.model, []).append(block.id)
        self._heads.update(heads)

    def block(self, id: BlockId, /) -> Block | None:
        """See `ChainView`."""
        return self.blocks.get(id)

    def is_accepted(self, id: BlockId, /) -> bool:
        """See `ChainView`."""
        return id in self._accepted

    def manifest(self, id: ManifestId, /) -> Manifest | None:
        """See `ChainView`."""
        return self.manifests.get(id)

    def release_subjects(self, release: BlockId, /) -> Mapping[Subject, BlockId] | None:
        """See `ChainView`."""
        return self.bodies.get(release)

    def releases(self, model: BlockId, /) -> Sequence[BlockId]:
        """See `ChainView`."""
        return self._releases.get(model, [])

    def successors(self, base: BlockId, /) -> Sequence[BlockId]:
        """See `ChainView`."""
        return self._by_base.get(base, [])

    def heads(self, model: BlockId, /) -> Mapping[Subject, BlockId]:
        """See `ChainView`."""
        return self._heads.get(model, {})

    def models(self) -> Sequence[BlockId]:
        """See `ChainView`."""
        return [id for id in self.log if self.blocks[id].header.kind is Kind.MODEL]


class Overlay:
    """`under` with more blocks: staged ones, and ones that count as accepted.

    What `under` says of a block is remembered: a batch asks for the same parents again and again.
    """

    def __init__(
        self, under: ChainView, *, staged: Iterable[Block] = (), accepted: Iterable[Block] = ()
    ) -> None:
        self._under = under
        self._blocks: dict[BlockId, Block] = {}
        self._seen: dict[BlockId, Block] = {}
        self._manifests: dict[ManifestId, Manifest] = {}
        self._bodies: dict[BlockId, Mapping[Subject, BlockId]] = {}
        self._accepted: dict[BlockId, Block] = {}
        self._by_base: dict[BlockId, list[BlockId]] = {}
        for block in staged:
            self.stage(block)
        for block in accepted:
            self._blocks[block.id] = self._accepted[block.id] = block
            if block.header.base is not None:
                self._by_base.setdefault(block.header.base, []).append(block.id)

    def stage(self, block: Block) -> None:
        """Lays one more staged block over the view."""
        self._blocks[block.id] = block

    def unstage(self, id: BlockId) -> None:
        """Takes a staged block away; what the view beneath has stays."""
        self._blocks.pop(id, None)
        self._seen.pop(id, None)

    def add_manifest(self, id: ManifestId, manifest: Manifest) -> None:
        """Lays one more manifest over the view."""
        self._manifests[id] = manifest

    def add_body(self, release: BlockId, subjects: Mapping[Subject, BlockId]) -> None:
        """Lays the body of a release over the view."""
        self._bodies[release] = subjects

    def block(self, id: BlockId, /) -> Block | None:
        """See `ChainView`."""
        known = self._blocks.get(id) or self._seen.get(id)
        if known is None and (known := self._under.block(id)) is not None:
            self._seen[id] = known
        return known

    def is_accepted(self, id: BlockId, /) -> bool:
        """See `ChainView`."""
        return id in self._accepted or self._under.is_accepted(id)

    def manifest(self, id: ManifestId, /) -> Manifest | None:
        """See `ChainView`."""
        return self._manifests.get(id) or self._under.manifest(id)

    def release_subjects(self, release: BlockId, /) -> Mapping[Subject, BlockId] | None:
        """See `ChainView`."""
        return self._bodies.get(release) or self._under.release_subjects(release)

    def releases(self, model: BlockId, /) -> Sequence[BlockId]:
        """See `ChainView`."""
        more = (
            block.id
            for block in self._accepted.values()
            if block.header.kind is Kind.RELEASE and block.header.model == model
        )
        return [*self._under.releases(model), *more]

    def successors(self, base: BlockId, /) -> Sequence[BlockId]:
        """See `ChainView`."""
        return [*self._under.successors(base), *self._by_base.get(base, ())]

    def heads(self, model: BlockId, /) -> Mapping[Subject, BlockId]:
        """See `ChainView`: those of the view beneath, which the overlay does not change."""
        return self._under.heads(model)

    def models(self) -> Sequence[BlockId]:
        """See `ChainView`."""
        more = (b.id for b in self._accepted.values() if b.header.kind is Kind.MODEL)
        return [*self._under.models(), *more]
