"""Drafting: a checked directory becomes blocks, and what is there already is taken as it is.

A draft is made behind a sink. Behind the store's `Ingest` it is a publish: chunks are stored and
blocks staged on the way. Behind its `Tally` it is a dry run: the same reading, hashing and
comparing, counted and not written.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.services.authoring import Author, Body, Place, Sink, write_files
from blyan_node.services.watched import Watched
from protocols.dag.header import Block, Kind
from protocols.dag.heads import first_releases, follow
from protocols.dag.release import ENTRY, encode_release
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text
from protocols.tensors.manifest import Dtype
from storage.store import Store
from storage.tally import Tally

_LISTED_BYTES = 64  # at most, of a release beside the subject's name: a block id and lengths


@dataclass(frozen=True)
class Found:
    """The model of this author and name that the store has; `staged`: its publish never ended."""

    id: BlockId
    staged: bool


@dataclass(frozen=True)
class Draft:
    """A publish but for its end: `release` is None if nothing has changed.

    `found` is None if there was no such model; `bytes` counts the model with its files, without
    the release, and so does `reused_bytes`; `new_bytes` counts the release as well.
    """

    model: BlockId
    found: Found | None
    subjects: Mapping[Subject, BlockId]
    release: tuple[Block, Body] | None
    fresh: int
    bytes: int
    reused_bytes: int
    new_bytes: int

    @property
    def experts(self) -> int:
        """How many experts the model has."""
        return sum(".expert" in subject for subject in self.subjects)


@dataclass(frozen=True)
class Source:
    """What is to be published: a directory that was checked, a name, and where it came from."""

    checkpoint: Checkpoint
    name: str
    origin: str | None = None

    @property
    def bytes(self) -> int:
        """The model with its files."""
        return self.checkpoint.size + sum(map(len, self.checkpoint.files.values()))

    @property
    def stored_bytes_max(self) -> int:
        """The same, and the body of a release that lists every subject."""
        return self.bytes + sum(len(p.subject) + _LISTED_BYTES for p in self.checkpoint.subjects)


class Drafting:
    """One run over a directory, on a worker thread. `check` comes before `draft`."""

    def __init__(self, store: Store, author: Author, source: Source) -> None:
        self._store = store
        self._author = author
        self._source = source
        self._checkpoint = source.checkpoint

    def check(self) -> Found | None:
        """The model that this directory is a version of, None if it is a new one.

        Raises `Refused` if the model of this name has another configuration.
        """
        ours = (id for id in self._store.models() if self._is_ours(id))
        if (id := next(ours, None)) is not None:
            self._require_same(id, self._files)
            return Found(id, staged=False)
        for id in self._staged():
            if self._has_body(id, self._files):
                return Found(id, staged=True)
        return None

    def left_over(self) -> list[BlockId]:
        """Blocks of publishes under this name that never ended, and had another configuration."""
        others = (id for id in self._staged() if not self._has_body(id, self._files))
        return [block for id in others for block in self._store.staged(id)]

    def draft(self, sink: Sink, found: Found | None, watched: Watched) -> Draft:
        """Reads the whole directory into `sink`; returns when all of it is stored.

        Raises `Refused` if the directory was changed meanwhile.
        """
        model = self._model(sink, found, watched)
        fresh = found is None or found.staged
        count = int(fresh)
        heads = self._store.heads(model)
        staged = self._staged_parts(model)
        subjects: dict[Subject, BlockId] = {}
        for part in self._checkpoint.subjects:
            body = self._body(sink, part.subject, watched)
            head = heads.get(part.subject)
            if head is not None and self._has_body(head, body):
                subjects[part.subject] = head
                continue
            count += 1
            there = staged.get((part.subject, body.id, head))
            if there is None:
                place = Place(part.kind, model, part.subject, head, {"staged": 1})
                there = self._sign(sink, place, body)
            subjects[part.subject] = there
        self._checkpoint.require_unchanged()
        sink.flush()
        reused = sink.reused_bytes
        release = None if subjects == heads else self._release(sink, model, subjects)
        watched.end()
        count += release is not None
        return Draft(
            model, found, subjects, release, count, self._source.bytes, reused, sink.new_bytes
        )

    @cached_property
    def _files(self) -> Body:
        """The body that a model block of this directory has."""
        return write_files(Tally(self._store.chunks), self._checkpoint.files)

    def _sign(self, sink: Sink, place: Place, body: Body) -> BlockId:
        block = self._author.block(place, body)
        sink.stage(block, *body.row)
        return block.id

    def _model(self, sink: Sink, found: Found | None, watched: Watched) -> BlockId:
        """The model block: the one that is there, or a new one."""
        body = write_files(sink, self._checkpoint.files)
        watched.add(body.manifest.size)
        if found is not None:
            return found.id
        meta = {"name": self._source.name, "family": self._checkpoint.config.family}
        return self._sign(sink, Place(Kind.MODEL, meta=meta), body)

    def _staged(self) -> Iterator[BlockId]:
        return (id for id in self._store.staged_models() if self._is_ours(id))

    def _is_ours(self, id: BlockId) -> bool:
        block = self._store.block(id)
        if block is None:
            return False
        header, public = block.header, self._author.identity.public
        return header.author == public and header.meta["name"] == self._source.name

    def _require_same(self, model: BlockId, body: Body) -> None:
        """Refuses another configuration under a name; says in which files it differs."""
        if self._has_body(model, body):
            return
        _, manifest = self._store.body(model)
        before = {entry.name: entry for entry in manifest.tensors}
        after = {entry.name: entry for entry in body.manifest.tensors}
        names = sorted(n for n in before | after if before.get(n) != after.get(n))
        raise Refused(
            ErrorCode.CONFLICT,
            f"{self._source.name} was not published",
            f"you have published a model of this name with other {', '.join(names)[:200]}",
            "Publish it under another name, or with the files that it had.",
            {"model": cid_text(model), "name": self._source.name, "files": names},
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

    def _body(self, sink: Sink, subject: Subject, watched: Watched) -> Body:
        return Body.of(
            sink.write_tensor(t.name, t.dtype, t.shape, watched.counted(t.pieces))
            for t in self._checkpoint.read(subject)
        )

    def _has_body(self, id: BlockId, body: Body) -> bool:
        block = self._store.block(id)
        return block is not None and block.header.body == body.id

    def _release(
        self, sink: Sink, model: BlockId, subjects: Mapping[Subject, BlockId]
    ) -> tuple[Block, Body]:
        data = encode_release(subjects)
        body = Body.of([sink.write_tensor(ENTRY, Dtype.U8, (len(data),), (data,))])
        sink.flush()
        first = first_releases(model, self._store)
        base = follow(first[0], self._store) if first else None
        meta = {} if self._source.origin is None else {"source": self._source.origin}
        return self._author.block(Place(Kind.RELEASE, model, None, base, meta), body), body
