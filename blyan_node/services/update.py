"""Updating one part of a model: other bytes for the same tensors, by compare-and-swap."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from blyan_node.moe.safetensors_file import (
    Stamp,
    StoredTensor,
    read_header,
    read_pieces,
    require_unchanged,
)
from blyan_node.services.authoring import Author, Body, Place, Submits, require_accepted
from protocols.dag.header import Block
from protocols.dag.update import require_head
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Root, Subject, cid_text, model_root, peer_id_of
from protocols.tensors.manifest import Manifest
from storage.pins import Pin
from storage.store import Store


@dataclass(frozen=True)
class Updated:
    """The head of a subject after an update, what it replaced, and the model's root."""

    subject: Subject
    block: BlockId
    base: BlockId
    root: Root


class Update:
    """Updates single subjects. `authoring` is shared by all who sign blocks."""

    def __init__(
        self, store: Store, chain: Submits, author: Author, authoring: trio.CapacityLimiter
    ) -> None:
        self._store = store
        self._chain = chain
        self._author = author
        self._authoring = authoring

    async def update(
        self, model: BlockId, subject: Subject, weights: Path, base: BlockId | None = None
    ) -> Updated:
        """Replaces `subject` by the tensors of a safetensors file.

        `base` is the head that the author means to replace, None for whichever is current. Bytes
        that are the head's already make no new block. Raises `Refused`.
        """
        async with self._author.turn:
            write = partial(self._write, model, subject, weights, base)
            head, made = await trio.to_thread.run_sync(write, limiter=self._authoring)
            if made is not None:
                block, body = made
                await self._chain.submit([block], [body.row], None)
                require_accepted(self._store, block)
                head = block.id
        replaced = self._store.block(head)
        assert replaced is not None
        heads = self._store.heads(model)
        return Updated(subject, head, replaced.header.base or head, model_root(model, heads))

    def _write(
        self, model: BlockId, subject: Subject, weights: Path, base: BlockId | None
    ) -> tuple[BlockId, tuple[Block, Body] | None]:
        """The current head and, if the bytes are others, the block that replaces it."""
        self._require_author(model)
        head = require_head(self._store.heads(model), subject, base)
        before, manifest = self._store.body(head)
        stamp, found = Stamp.of(weights), read_header(weights)
        _require_same_tensors(subject, manifest, found)
        with self._store.ingest() as ingest:
            body = Body.of(
                ingest.write_tensor(e.name, e.dtype, e.shape, _pieces(weights, found[e.name]))
                for e in manifest.tensors
            )
            ingest.flush()
            require_unchanged(weights, stamp)
            if body.id == before.header.body:
                return head, None
            place = Place(before.header.kind, model, subject, head)
            block = self._author.block(place, body)
            # From here on the garbage collector knows the chunks by the manifest of a staged block.
            self._store.stage([block], [body.row])
            self._store.pin(block.id, reason=Pin.PUBLISHED)
        return head, (block, body)

    def _require_author(self, model: BlockId) -> None:
        block = self._store.block(model)
        if block is not None and block.header.author != self._author.identity.public:
            owner = peer_id_of(block.header.author)
            raise Refused(
                ErrorCode.NOT_ALLOWED,
                "the model was not updated",
                f"only its author {owner} may update it",
                "Run the update on the author's node.",
                {"model": cid_text(model), "author": owner},
            )


def _pieces(path: Path, stored: StoredTensor) -> Iterator[bytes]:
    return read_pieces(path, stored.begin, stored.size)


def _refuse(subject: Subject, why: str) -> NoReturn:
    raise Refused(
        ErrorCode.BAD_MODEL,
        f"{subject} was not updated",
        why,
        "`blyan-node model show` lists the tensors of each subject.",
        {"subject": subject},
    )


def _require_same_tensors(
    subject: Subject, manifest: Manifest, found: dict[str, StoredTensor]
) -> None:
    """The file has exactly the tensors of the subject, in type and shape; raises `Refused`."""
    wanted = {entry.name: entry for entry in manifest.tensors}
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            _refuse(subject, f"the file has no tensor {name}")
        if name not in wanted:
            _refuse(subject, f"{subject} has no tensor {name[:80]!r}, but {sorted(wanted)}"[:300])
        have, want = found[name], wanted[name]
        if (have.dtype, have.shape) != (want.dtype, want.shape):
            _refuse(
                subject,
                f"{name} is {have.dtype} {list(have.shape)} in the file and "
                f"{want.dtype} {list(want.shape)} in the model",
            )
