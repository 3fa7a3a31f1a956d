"""Exporting: a model, at its heads or at any root it ever had, as a Hugging Face directory."""

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from blyan_node.moe.export import write_checkpoint
from blyan_node.moe.families import parse_config
from blyan_node.services.supply import Progress, Supply, silent
from blyan_node.services.watched import Watched
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Root, Subject, cid_text, root_text
from protocols.tensors.manifest import Dtype
from storage.store import Store


@dataclass(frozen=True)
class Exported:
    """Where the directory is, and what it holds."""

    path: Path
    files: int
    bytes: int


class Export:
    """Writes models to directories; what is not stored here is fetched first."""

    def __init__(self, store: Store, supply: Supply, files: trio.CapacityLimiter) -> None:
        self._store = store
        self._supply = supply
        self._files = files

    async def export(
        self, model: BlockId, out: Path, root: Root | None = None, progress: Progress = silent
    ) -> Exported:
        """Writes `model` to `out`, which does not exist or is empty. Raises `Refused`."""
        require_empty(out)
        heads = self.heads(model, root)
        await self._supply.ensure([model, *heads.values()], progress)
        write = partial(self._write, model, heads, out, progress)
        return await trio.to_thread.run_sync(write, limiter=self._files)

    def heads(self, model: BlockId, root: Root | None) -> Mapping[Subject, BlockId]:
        """The heads of `model` now, or at `root`; raises `Refused` for a root of no such model."""
        if root is None:
            return self._store.heads(model)
        at = self._store.heads_at(root)
        if at is None or at.model != model:
            raise Refused(
                ErrorCode.NOT_FOUND,
                "no such root",
                f"{root_text(root)} was never a root of this model here",
                "`blyan-node model list` shows current roots.",
                {"root": root_text(root), "model": cid_text(model)},
            )
        return at.heads

    def _write(
        self, model: BlockId, heads: Mapping[Subject, BlockId], out: Path, progress: Progress
    ) -> Exported:
        reading = _Reading(self._store, heads, progress)
        files = {e.name: b"".join(pieces) for e, pieces in self._store.read_body(model)}
        config = parse_config(files["config.json"])
        try:
            written = write_checkpoint(out, config, files, reading.describe, reading.read)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise Refused(
                ErrorCode.DISK_FULL if full else ErrorCode.BAD_INPUT,
                f"{out} was not written",
                error.strerror or str(error),
                "Remove what is there, free some space, and export again."
                if full
                else "Remove what is there, and give a folder that the node may write to.",
                {"path": str(out)},
            ) from error
        reading.end()
        return Exported(out, written.files, written.bytes)


class _Reading:
    """The tensors of a model by subject and name, with progress, on a worker thread."""

    def __init__(self, store: Store, heads: Mapping[Subject, BlockId], progress: Progress) -> None:
        self._store = store
        self._heads = heads
        total = sum(store.body(id)[0].header.size for id in heads.values())
        self._watched = Watched(progress, total, "export")

    def end(self) -> None:
        """Tells that everything was read."""
        self._watched.end()

    def describe(self, subject: Subject) -> dict[str, tuple[Dtype, tuple[int, ...]]]:
        """Types and shapes by name; a subject that the model lacks has none."""
        if subject not in self._heads:
            return {}
        _, manifest = self._store.body(self._heads[subject])
        return {entry.name: (entry.dtype, entry.shape) for entry in manifest.tensors}

    def read(self, subject: Subject, name: str) -> Iterator[bytes]:
        """The verified bytes of one tensor."""
        block, manifest = self._store.body(self._heads[subject])
        for piece in self._store.read_tensor(block, manifest.tensor(name)):
            yield piece
            self._watched.add(len(piece))


def require_empty(out: Path) -> None:
    """Raises `Refused` if `out` is something that an export would mix with."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(
            ErrorCode.CONFLICT,
            f"{out} is not empty",
            "an export is never mixed with what is there",
            "Name a directory that does not exist, or an empty one.",
            {"path": str(out)},
        )
