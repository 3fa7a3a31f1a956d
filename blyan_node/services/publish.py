"""Publishing: a Hugging Face directory becomes signed blocks, announced when it is whole.

The model block and a block for each subject are staged one after another; a release that lists
them ends the publish and makes them count. Whatever interrupts it, what is staged stays: publishing
again reads and hashes the directory, finds the staged blocks with the same bodies, and goes on
behind them. Of a model that has a release already, subjects with other bytes become staged updates
of the current heads under a new release; nothing changed means no new block.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.services.authoring import Author, Body, Place, Submits, require_accepted
from blyan_node.services.comparing import Compared, Comparison
from blyan_node.services.supply import Progress, silent
from blyan_node.services.surveying import make_sure_of_room
from protocols.dag.header import Block, Kind
from protocols.dag.heads import first_releases, follow
from protocols.dag.release import ENTRY, encode_release
from protocols.ids import BlockId, Root, Subject, model_root
from protocols.tensors.manifest import Dtype
from storage.gc import collect
from storage.pins import Pin
from storage.store import Store
from storage.tensors import Ingest

Meta = Mapping[str, str | int]


@dataclass(frozen=True)
class Published:
    """What a publish did; `blocks` counts new ones, `bytes` the whole model with its files."""

    model: BlockId
    name: str
    root: Root
    blocks: int
    experts: int
    bytes: int
    reused_bytes: int


@dataclass(frozen=True)
class _Draft:
    """A publish whose blocks are all staged; `release` is None if nothing has changed."""

    model: BlockId
    subjects: Mapping[Subject, BlockId]
    release: tuple[Block, Body] | None
    fresh: int
    bytes: int
    reused_bytes: int


class Publish:
    """Publishes directories, one at a time. `authoring` is shared by all who sign blocks."""

    def __init__(
        self, store: Store, chain: Submits, author: Author, authoring: trio.CapacityLimiter
    ) -> None:
        self._store = store
        self._chain = chain
        self._author = author
        self._authoring = authoring

    async def publish(self, path: Path, name: str, progress: Progress = silent) -> Published:
        """Publishes the directory `path` as the model `name`; raises `Refused`."""
        async with self._author.turn:
            write = partial(self._write, path, name, progress)
            draft = await trio.to_thread.run_sync(write, limiter=self._authoring)
            if draft.release is not None:
                block, body = draft.release
                await self._chain.submit([block], [body.row], None)
                require_accepted(self._store, block)
            tidy = partial(self._tidy, draft)
            await trio.to_thread.run_sync(tidy, limiter=self._authoring)
        return Published(
            model=draft.model,
            name=name,
            root=model_root(draft.model, draft.subjects),
            blocks=draft.fresh,
            experts=sum(".expert" in subject for subject in draft.subjects),
            bytes=draft.bytes,
            reused_bytes=draft.reused_bytes,
        )

    def _write(self, path: Path, name: str, progress: Progress) -> _Draft:
        checkpoint = Checkpoint.open(path)
        public = self._author.identity.public
        make_sure_of_room(self._store, public, checkpoint, name)
        comparison = Comparison(self._store, public, checkpoint, name, progress)
        meta = {"name": name, "family": checkpoint.config.family}
        writing = _Writing(self._store, self._author, comparison, meta)
        with self._store.ingest() as ingest:
            draft = writing.draft(ingest)
        # Before anybody is told: whatever ends this process now, what was told of is kept.
        releases = list(self._store.releases(draft.model))
        if draft.release is not None:
            releases.append(draft.release[0].id)
        self._store.pin(draft.model, *draft.subjects.values(), *releases, reason=Pin.PUBLISHED)
        return draft

    def _tidy(self, draft: _Draft) -> None:
        """Forgets what the release left out: it was of a publish that never ended."""
        left_over = self._store.staged(draft.model)
        if left_over:
            self._store.unstage(left_over)
            collect(self._store)


class _Writing:
    """One run over a directory, on the authoring thread."""

    def __init__(self, store: Store, author: Author, comparison: Comparison, meta: Meta) -> None:
        self._store = store
        self._author = author
        self._comparison = comparison
        self._meta = meta

    def draft(self, ingest: Ingest) -> _Draft:
        """Stages what is new; returns when all of it is stored."""
        model, fresh = self._model(ingest)
        subjects: dict[Subject, BlockId] = {}
        for part in self._comparison.subjects(ingest, model):
            fresh += part.changed
            subjects[part.subject] = part.known or self._stage(ingest, model, part)
        ingest.flush()
        reused = ingest.reused_bytes
        release = None
        if subjects != self._store.heads(model):
            release = self._release(ingest, model, subjects)
        fresh += release is not None
        return _Draft(model, subjects, release, fresh, self._comparison.size, reused)

    def _model(self, ingest: Ingest) -> tuple[BlockId, int]:
        """The model block: the one that is there, or a new one that is staged."""
        accepted = self._comparison.accepted()  # refuses before anything is written
        body = self._comparison.files(ingest)
        if accepted is not None:
            return accepted, 0
        for block in self._comparison.staged():
            if block.header.body == body.id:
                return block.id, 1
            self._store.unstage(self._store.staged(block.id))  # of a publish that never ended
        block = self._author.block(Place(Kind.MODEL, meta=self._meta), body)
        ingest.stage(block, *body.row)
        return block.id, 1

    def _stage(self, ingest: Ingest, model: BlockId, part: Compared) -> BlockId:
        place = Place(part.kind, model, part.subject, part.head, {"staged": 1})
        block = self._author.block(place, part.body)
        ingest.stage(block, *part.body.row)
        return block.id

    def _release(
        self, ingest: Ingest, model: BlockId, subjects: Mapping[Subject, BlockId]
    ) -> tuple[Block, Body]:
        data = encode_release(subjects)
        body = Body.of([ingest.write_tensor(ENTRY, Dtype.U8, (len(data),), (data,))])
        ingest.flush()
        first = first_releases(model, self._store)
        base = follow(first[0], self._store) if first else None
        block = self._author.block(Place(Kind.RELEASE, model, None, base), body)
        self._store.stage([block], [body.row], release_subjects={block.id: subjects})
        return block, body
