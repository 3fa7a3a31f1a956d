"""A publish before it is done: what it would store, what is here already, how long it would take.

A survey reads and hashes the whole directory, as the publish will, and writes nothing to the store.
The time is an estimate from this machine: the survey's own pace for what is stored already, and for
what is new the pace at which a piece of the model goes into a store made for it and thrown away.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.services.comparing import Comparison
from blyan_node.services.supply import Progress, silent
from protocols import limits
from protocols.errors import Refused
from protocols.ids import BlockId, PublicKey, Root, model_root
from storage.errors import DiskFull
from storage.store import Store, open_store
from storage.survey import Survey

Clock = Callable[[], float]


@dataclass(frozen=True)
class Surveyed:
    """What a publish would do; `model` and `root` are there if it changes nothing about them.

    `blocks` counts new ones, `bytes` the whole model with its files; `new_bytes` would be stored.
    """

    model: BlockId | None
    root: Root | None
    blocks: int
    experts: int
    bytes: int
    reused_bytes: int
    new_bytes: int
    estimate_s: float


class Surveying:
    """Surveys directories for the author of `public`."""

    def __init__(
        self,
        store: Store,
        public: PublicKey,
        scratch: Path,
        authoring: trio.CapacityLimiter,
        clock: Clock = time.monotonic,
    ) -> None:
        """`scratch` is a folder on the store's disk."""
        self._store = store
        self._public = public
        self._scratch = scratch
        self._authoring = authoring
        self._clock = clock

    async def survey(self, path: Path, name: str, progress: Progress = silent) -> Surveyed:
        """Looks at the directory `path` as the model `name`; refuses what a publish would."""
        look = partial(self._look, path, name, progress)
        return await trio.to_thread.run_sync(look, limiter=self._authoring)

    def _look(self, path: Path, name: str, progress: Progress) -> Surveyed:
        checkpoint = Checkpoint.open(path)
        comparison = Comparison(self._store, self._public, checkpoint, name, progress)
        began = self._clock()
        found = _compare(self._store, comparison)
        hashing_s = self._clock() - began
        _require_room(self._store, found.new_bytes, checkpoint)
        estimate_s = hashing_s * found.reused_bytes / max(1, found.bytes)
        if found.new_bytes:
            estimate_s += self._seconds_a_byte(checkpoint) * found.new_bytes
        return replace(found, estimate_s=estimate_s)

    def _seconds_a_byte(self, checkpoint: Checkpoint) -> float:
        """How fast the first bytes of the model are read, hashed, stored and synced."""
        with (
            tempfile.TemporaryDirectory(prefix="survey-", dir=self._scratch) as folder,
            open_store(Path(folder)) as store,
        ):
            began, taken = self._clock(), 0
            with store.ingest() as ingest:
                for tensor in (t for p in checkpoint.subjects for t in checkpoint.read(p.subject)):
                    pieces = _first(tensor.pieces, limits.survey_sample_bytes - taken)
                    entry = ingest.write_tensor(tensor.name, tensor.dtype, tensor.shape, pieces)
                    taken += entry.size
                    if taken >= limits.survey_sample_bytes:
                        break
            return (self._clock() - began) / max(1, taken)


def make_sure_of_room(store: Store, public: PublicKey, checkpoint: Checkpoint, name: str) -> None:
    """Refuses a model that the disk or the quota cannot take, before anything is written.

    Only where the whole model would not fit is it compared with what is stored. Raises `DiskFull`.
    """
    comparison = Comparison(store, public, checkpoint, name, silent)
    try:
        store.chunks.make_sure_of_room(comparison.size)
    except DiskFull:
        _require_room(store, _compare(store, comparison).new_bytes, checkpoint)


def _compare(store: Store, comparison: Comparison) -> Surveyed:
    survey = Survey(store.chunks)
    accepted = comparison.accepted()
    body = comparison.files(survey)
    staged = [block.id for block in comparison.staged() if block.header.body == body.id]
    model = accepted if accepted is not None else staged[0] if staged else None
    parts = list(comparison.subjects(survey, model))
    subjects = {part.subject: part.known for part in parts if part.known is not None}
    heads = {} if model is None else store.heads(model)
    changed = subjects != heads or len(subjects) != len(parts)
    return Surveyed(
        model=accepted,
        root=None if accepted is None or changed else model_root(accepted, heads),
        blocks=(accepted is None) + sum(part.changed for part in parts) + changed,
        experts=sum(".expert" in part.subject for part in parts),
        bytes=comparison.size,
        reused_bytes=survey.reused_bytes,
        new_bytes=survey.new_bytes,
        estimate_s=0.0,
    )


def _require_room(store: Store, new_bytes: int, checkpoint: Checkpoint) -> None:
    try:
        store.chunks.make_sure_of_room(new_bytes)
    except DiskFull as error:
        raise Refused(
            error.code,
            "the model was not published, and nothing was written",
            f"{new_bytes} bytes of it are not stored yet: {error.why}",
            "Free some space, raise --disk, or publish it from a node with more room.",
            {"path": str(checkpoint.path), "new_bytes": new_bytes},
        ) from error


def _first(pieces: Iterable[bytes], count: int) -> Iterator[bytes]:
    """The first `count` bytes, in pieces."""
    for piece in pieces:
        if count <= 0:
            return
        yield piece[:count]
        count -= len(piece)
