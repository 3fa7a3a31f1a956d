"""What of a directory the store has: the model, its heads, and what an unfinished publish staged.

A `Comparison` reads and hashes the directory once, subject by subject; whoever takes the bytes
decides whether they are stored (a publish) or only counted (a survey). Blocking.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.services.authoring import Body, Takes, write_files
from blyan_node.services.supply import Progress
from blyan_node.services.watched import Watched
from protocols.dag.header import Block, Kind
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, PublicKey, Subject, cid_text
from storage.store import Store
from storage.survey import Survey


@dataclass(frozen=True)
class Compared:
    """One subject of the directory; `known` is the head or staged block that has its body."""

    subject: Subject
    kind: Kind
    body: Body
    head: BlockId | None
    known: BlockId | None

    @property
    def changed(self) -> bool:
        """Whether a release has to say something new about it."""
        return self.known is None or self.known != self.head


class Comparison:
    """One run over a directory that `author` publishes as `name`."""

    def __init__(
        self, store: Store, author: PublicKey, checkpoint: Checkpoint, name: str, progress: Progress
    ) -> None:
        self._store = store
        self._author = author
        self._checkpoint = checkpoint
        self._name = name
        self.size = checkpoint.size + sum(map(len, checkpoint.files.values()))
        self._watched = Watched(progress, self.size, name)

    def files(self, takes: Takes) -> Body:
        """The body of the model block."""
        body = write_files(takes, self._checkpoint.files)
        self._watched.add(body.manifest.size)
        return body

    def accepted(self) -> BlockId | None:
        """The author's model of this name, if there is one; it has to have these very files.

        Raises `Refused` CONFLICT if it has others.
        """
        body = write_files(Survey(self._store.chunks), self._checkpoint.files)
        for id in self._store.models():
            block = self._store.block(id)
            if block is not None and self._is_ours(block):
                self._require_same(block, body)
                return id
        return None

    def staged(self) -> list[Block]:
        """Model blocks of this name that publishes left behind which never ended."""
        found = (self._store.block(id) for id in self._store.staged_models())
        return [block for block in found if block is not None and self._is_ours(block)]

    def subjects(self, takes: Takes, model: BlockId | None) -> Iterator[Compared]:
        """Every subject, in the order of a forward pass, against the heads of `model`."""
        heads: Mapping[Subject, BlockId] = {} if model is None else self._store.heads(model)
        staged = {} if model is None else self._staged_parts(model)
        for part in self._checkpoint.subjects:
            body = Body.of(
                takes.write_tensor(t.name, t.dtype, t.shape, self._counted(t.pieces))
                for t in self._checkpoint.read(part.subject)
            )
            head = heads.get(part.subject)
            if head is not None and self._has_body(head, body):
                known: BlockId | None = head
            else:
                known = staged.get((part.subject, body.id, head))
            yield Compared(part.subject, part.kind, body, head, known)
        self._watched.end()

    def _is_ours(self, block: Block) -> bool:
        header = block.header
        return header.author == self._author and header.meta["name"] == self._name

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

    def _has_body(self, id: BlockId, body: Body) -> bool:
        block = self._store.block(id)
        return block is not None and block.header.body == body.id

    def _counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            self._watched.add(len(piece))
