"""Publishing: a Hugging Face directory becomes signed blocks, announced when it is whole.

The model block and a block for each subject are staged one after another; a release that lists
them ends the publish and makes them count. Whatever interrupts it, what is staged stays: publishing
again reads and hashes the directory, finds the staged blocks with the same bodies, and goes on
behind them. Of a model that has a release already, subjects with other bytes become staged updates
of the current heads under a new release; nothing changed means no new block.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.services.authoring import (
    Author,
    Body,
    Place,
    Submits,
    require_accepted,
    write_files,
)
from blyan_node.services.supply import Progress, silent
from blyan_node.services.watched import Watched
from protocols.dag.header import Block, Kind
from protocols.dag.heads import first_releases, follow
from protocols.dag.release import ENTRY, encode_release
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Root, Subject, cid_text, model_root
from protocols.tensors.manifest import Dtype
from storage.gc import collect
from storage.pins import Pin
from storage.store import Store
from storage.tensors import Ingest


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
        writing = _Writing(self._store, self._author, checkpoint, name, progress)
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

    def __init__(
        self, store: Store, author: Author, checkpoint: Checkpoint, name: str, progress: Progress
    ) -> None:
        self._store = store
        self._author = author
        self._checkpoint = checkpoint
        self._name = name
        total = checkpoint.size + sum(map(len, checkpoint.files.values()))
        self._watched = Watched(progress, total, name)

    def draft(self, ingest: Ingest) -> _Draft:
        """Stages what is new; returns when all of it is stored."""
        model, fresh = self._model(ingest)
        heads = self._store.heads(model)
        staged = self._staged_parts(model)
        subjects: dict[Subject, BlockId] = {}
        for part in self._checkpoint.subjects:
            body = self._body(ingest, part.subject)
            head = heads.get(part.subject)
            if head is not None and self._has_body(head, body):
                subjects[part.subject] = head
                continue
            fresh += 1
            found = staged.get((part.subject, body.id, head))
            if found is None:
                place = Place(part.kind, model, part.subject, head, {"staged": 1})
                block = self._author.block(place, body)
                ingest.stage(block, *body.row)
                found = block.id
            subjects[part.subject] = found
        ingest.flush()
        reused = ingest.reused_bytes
        release = None if subjects == heads else self._release(ingest, model, subjects)
        fresh += release is not None
        self._watched.end()
        return _Draft(model, subjects, release, fresh, self._watched.total, reused)

    def _model(self, ingest: Ingest) -> tuple[BlockId, int]:
        """The model block: the one that is there, or a new one that is staged."""
        body = write_files(ingest, self._checkpoint.files)
        self._watched.add(body.manifest.size)
        for id in self._store.models():
            block = self._store.block(id)
            if block is not None and self._is_ours(block):
                self._require_same(block, body)
                return id, 0
        for id in self._store.staged_models():
            block = self._store.block(id)
            if block is not None and self._is_ours(block):
                if block.header.body == body.id:
                    return id, 1
                self._store.unstage(self._store.staged(id))  # of a publish that never ended
        meta = {"name": self._name, "family": self._checkpoint.config.family}
        block = self._author.block(Place(Kind.MODEL, meta=meta), body)
        ingest.stage(block, *body.row)
        return block.id, 1

    def _is_ours(self, block: Block) -> bool:
        header = block.header
        return header.author == self._author.identity.public and header.meta["name"] == self._name

    def _require_same(self, block: Block, body: Body) -> None:
        """Refuses another configuration under a name; says in which files it differs."""
        if block.header.body == body.id:
            return
        _, manifest = self._store.body(block.id)
        before = {entry.name: entry for entry in manifest.tensors}
        after = {entry.name: entry for entry in body.manifest.tensors}
        names = sorted(n for n in before | after if before.get(n) != after.get(n))
        raise Refused(
            ErrorCode.CONFLICT,
            f"{self._name} was not published",
            f"you have published a model of this name with other {', '.join(names)[:200]}",
            "Publish it under another name, or with the files that it had.",
            {"model": cid_text(block.id), "name": self._name, "files": names},
        )

    def _staged_parts(self, model: BlockId) -> dict[tuple[Subject, bytes, BlockId | None], BlockId]:
        """What an interrupted publish left: (subject, body, base) → block."""
        found: dict[tuple[Subject, bytes, BlockId | None], BlockId] = {}
        for id in self._store.staged(model):
            block = self._store.block(id)
            if block is not None and block.header.subject is not None and block.header.body:
                key = (block.header.subject, bytes(block.header.body), block.header.base)
                found[key] = id
        return found

    def _body(self, ingest: Ingest, subject: Subject) -> Body:
        return Body.of(
            ingest.write_tensor(t.name, t.dtype, t.shape, self._counted(t.pieces))
            for t in self._checkpoint.read(subject)
        )

    def _has_body(self, id: BlockId, body: Body) -> bool:
        block = self._store.block(id)
        return block is not None and block.header.body == body.id

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

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self._watched.add(len(piece))
