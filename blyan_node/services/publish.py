"""Publishing: a Hugging Face directory becomes signed blocks, announced when it is whole.

The model block and a block for each subject are staged one after another; a release that lists
them ends the publish and makes them count. Whatever interrupts it, what is staged stays: publishing
again reads and hashes the directory, finds the staged blocks with the same bodies, and goes on
behind them. Of a model that has a release already, subjects with other bytes become staged updates
of the current heads under a new release; nothing changed means no new block.

Whatever can be refused is refused before the first byte is written: a directory that does not fit
its configuration, another configuration under the name, and a model for which there is no room. If
there may be none, the directory is read once more before it is published, to learn what is stored
already. `Publish.rehearse` is that reading alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.services.authoring import Author, Submits, require_accepted
from blyan_node.services.drafting import Draft, Drafting, Found, Source
from blyan_node.services.supply import Progress, silent
from blyan_node.services.watched import Watched
from protocols.ids import BlockId, Root, model_root
from storage.errors import DiskFull
from storage.gc import collect
from storage.pins import Pin
from storage.store import Store
from storage.tally import Tally


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
class Rehearsal:
    """What a publish would do, in its own numbers; `seconds` is what reading and hashing took.

    `model` is None if it would be a new one. `new_bytes` are chunks that are not stored yet, with
    the release; `room_bytes` is how much may be stored now.
    """

    model: BlockId | None
    name: str
    blocks: int
    experts: int
    bytes: int
    reused_bytes: int
    new_bytes: int
    room_bytes: int
    seconds: float
    kept_bytes: int = 0  # of layers that are never computed


@dataclass(frozen=True)
class Inspected:
    """What a publish would be of; `blocks` if it is a new model, and `model` is then None."""

    model: BlockId | None
    name: str
    blocks: int
    experts: int
    bytes: int
    room_bytes: int
    kept_bytes: int = 0  # of layers that are never computed


class Publish:
    """Publishes directories, one at a time. `authoring` is shared by all who sign blocks."""

    def __init__(
        self,
        store: Store,
        chain: Submits,
        author: Author,
        authoring: trio.CapacityLimiter,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._store = store
        self._chain = chain
        self._author = author
        self._authoring = authoring
        self._clock = clock
        self._rehearsing = trio.CapacityLimiter(1)

    async def publish(
        self, path: Path, name: str, progress: Progress = silent, origin: str | None = None
    ) -> Published:
        """Publishes the directory `path` as the model `name`; raises `Refused`.

        `origin` says in the release where the directory came from.
        """
        async with self._author.turn:
            write = partial(self._write, path, name, progress, origin)
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
            experts=draft.experts,
            bytes=draft.bytes,
            reused_bytes=draft.reused_bytes,
        )

    async def inspect(self, path: Path, name: str) -> Inspected:
        """What can be said of `path` without its weights; raises what `publish` would refuse with.

        Reads the configuration, the small files, and the headers of the weights.
        """
        read = partial(self._inspect, path, name)
        return await trio.to_thread.run_sync(read, limiter=self._rehearsing)

    async def rehearse(self, path: Path, name: str, progress: Progress = silent) -> Rehearsal:
        """What `publish` would do now; writes nothing. Raises what `publish` would refuse with."""
        read = partial(self._rehearse, path, name, progress)
        return await trio.to_thread.run_sync(read, limiter=self._rehearsing)

    def _inspect(self, path: Path, name: str) -> Inspected:
        source = Source(Checkpoint.open(path), name)
        found = Drafting(self._store, self._author, source).check()
        if found is None:
            self._store.chunks.make_sure_of_room(source.bytes)
        subjects = [part.subject for part in source.checkpoint.subjects]
        return Inspected(
            model=None if found is None else found.id,
            name=name,
            blocks=len(subjects) + 2,
            experts=sum(".expert" in subject for subject in subjects),
            bytes=source.bytes,
            room_bytes=self._store.chunks.room(),
            kept_bytes=source.checkpoint.kept_bytes,
        )

    def _rehearse(self, path: Path, name: str, progress: Progress) -> Rehearsal:
        begun = self._clock()
        source = Source(Checkpoint.open(path), name)
        found = Drafting(self._store, self._author, source).check()
        draft = self._count(source, found, progress)
        seconds = self._clock() - begun
        self._make_sure_of_room(source, draft)
        return Rehearsal(
            model=None if draft.found is None else draft.found.id,
            name=name,
            blocks=draft.fresh,
            experts=draft.experts,
            bytes=draft.bytes,
            reused_bytes=draft.reused_bytes,
            new_bytes=draft.new_bytes,
            room_bytes=self._store.chunks.room(),
            seconds=seconds,
            kept_bytes=source.checkpoint.kept_bytes,
        )

    def _count(self, source: Source, found: Found | None, progress: Progress) -> Draft:
        """The draft of a dry run."""
        watched = Watched(progress, source.bytes, f"{source.name}: comparing")
        drafting = Drafting(self._store, self._author.apart(), source)
        return drafting.draft(Tally(self._store.chunks), found, watched)

    def _make_sure_of_room(self, source: Source, draft: Draft) -> None:
        """Raises `DiskFull` with the numbers if what is new has no room."""
        try:
            self._store.chunks.make_sure_of_room(draft.new_bytes)
        except DiskFull as full:
            raise DiskFull(
                f"{draft.new_bytes} of its {draft.bytes} bytes are not stored yet; {full.why}",
                f"{source.name} was not published, and nothing was stored",
                path=str(source.checkpoint.path),
                name=source.name,
                bytes=draft.bytes,
                reused_bytes=draft.reused_bytes,
                new_bytes=draft.new_bytes,
                room_bytes=self._store.chunks.room(),
            ) from None

    def _write(self, path: Path, name: str, progress: Progress, origin: str | None) -> Draft:
        source = Source(Checkpoint.open(path), name, origin)
        drafting = Drafting(self._store, self._author, source)
        found = drafting.check()
        if source.stored_bytes_max > self._store.chunks.room():
            self._make_sure_of_room(source, self._count(source, found, progress))
        if left_over := drafting.left_over():
            self._store.unstage(left_over)
        with self._store.ingest() as ingest:
            draft = drafting.draft(ingest, found, Watched(progress, source.bytes, name))
            if draft.release is not None:
                block, body = draft.release
                subjects = {block.id: draft.subjects}
                self._store.stage([block], [body.row], release_subjects=subjects)
        # Before anybody is told: whatever ends this process now, what was told of is kept.
        releases = list(self._store.releases(draft.model))
        if draft.release is not None:
            releases.append(draft.release[0].id)
        self._store.pin(draft.model, *draft.subjects.values(), *releases, reason=Pin.PUBLISHED)
        return draft

    def _tidy(self, draft: Draft) -> None:
        """Forgets what the release left out: it was of a publish that never ended."""
        left_over = self._store.staged(draft.model)
        if left_over:
            self._store.unstage(left_over)
            collect(self._store)
