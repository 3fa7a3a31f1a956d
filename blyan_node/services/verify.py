"""Verifying a model: every byte of it that is stored here, read and held against the block ids."""

from dataclasses import dataclass
from functools import partial

import trio

from blyan_node.services.supply import Progress, silent
from blyan_node.services.watched import Watched
from protocols.errors import Refused
from protocols.ids import BlockId
from storage.errors import BlockMissing, Corrupt
from storage.pins import Pin
from storage.store import Store


@dataclass(frozen=True)
class Bad:
    """A block that does not check; `subject` is `model` or `release` for those of chain A."""

    subject: str
    block: BlockId
    why: str


@dataclass(frozen=True)
class Verified:
    """How many blocks and bytes were read whole, and what was wrong."""

    blocks: int
    bytes: int
    bad: tuple[Bad, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.bad


class Verify:
    """Reads what is stored of a model: its heads, its releases and its older versions.

    A block that this node is to keep (it published, holds or fetched it) and that is not whole is
    bad; one that it never had is not its business.
    """

    def __init__(self, store: Store, files: trio.CapacityLimiter) -> None:
        self._store = store
        self._files = files

    async def verify(self, model: BlockId, progress: Progress = silent) -> Verified:
        """Verifies every block of `model`."""
        read = partial(self._read, model, progress)
        return await trio.to_thread.run_sync(read, limiter=self._files)

    def _read(self, model: BlockId, progress: Progress) -> Verified:
        ids = self._blocks_of(model)
        whole, size, bad = 0, 0, list[Bad]()
        sizes = (b.header.size for id in ids if (b := self._store.block(id)) is not None)
        watched = Watched(progress, sum(sizes), "verify")
        for id, subject in ids.items():
            try:
                read = self._read_block(id, watched)
            except Refused as error:
                bad.append(Bad(subject, id, error.why))
                continue
            if read is not None:
                whole += 1
                size += read
        watched.end()
        return Verified(whole, size, tuple(bad))

    def _blocks_of(self, model: BlockId) -> dict[BlockId, str]:
        """Every accepted block of the model with its subject; heads first."""
        store = self._store
        found: dict[BlockId, str] = {model: "model"}
        found |= {id: str(subject) for subject, id in store.heads(model).items()}
        for release in store.releases(model):
            found[release] = "release"
            listed = store.release_subjects(release) or {}
            found |= {id: str(subject) for subject, id in listed.items()}
        for id, subject in list(found.items()):
            found |= {older: subject for older in self._versions(id)}
        return found

    def _versions(self, id: BlockId) -> list[BlockId]:
        """Everything that replaced a block, forks included."""
        found, frontier = list[BlockId](), [id]
        while frontier:
            following = list(self._store.successors(frontier.pop()))
            found += following
            frontier += following
        return found

    def _read_block(self, id: BlockId, watched: Watched) -> int | None:
        """How many bytes of a block were read; None if it need not be here. Raises `Refused`."""
        block, manifest = self._store.body(id)
        if not block.signature_holds():
            raise Corrupt("a block is damaged", "its signature does not hold")
        missing = self._store.missing_chunks(id)
        if missing and self._store.pins.of(id) - {Pin.WANTED}:
            raise BlockMissing(id, block.header.subject, f"{len(missing)} chunks are not here")
        for name, size in manifest.chunks():
            self._store.get_chunk(name)
            self._store.count_read(size)
            watched.add(size)
        return None if missing else manifest.size
