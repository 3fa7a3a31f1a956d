"""Models from the hub: downloaded beside the store, published as a directory, then removed.

What is needed of a repository is known before much of it is here. First come the small files, then
the start of each file of weights; that is enough to hold every tensor's shape against the
configuration and to ask whether there is room, and only then does the rest come. Pickles never do.
Each file is checked against the hash that the hub lists for the commit. Whatever ends a download,
what came stays in `HOME/downloads` and is completed by the next; a publish removes it.
"""

import importlib.util
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from blyan_node.hub.child import HubProcess, hub_process
from blyan_node.hub.messages import HubFile, Listing
from blyan_node.hub.reference import Reference
from blyan_node.moe.checkpoint import is_read, is_small, weight_files
from blyan_node.moe.safetensors_file import header_end
from blyan_node.moe.strict_json import refuse
from blyan_node.services.supply import Progress, silent
from protocols import limits
from protocols.errors import ErrorCode, Refused
from storage.errors import DiskFull

OUTLINE = "outline"
PARTIAL = ".partial"
FOLDER_MODE = 0o700

Inspect = Callable[[Path], Awaitable[int]]
"""Told of a directory with the right sizes and headers and no weights: raises `Refused` if it would
not be published, returns the bytes that publishing it certainly stores.
"""


@dataclass(frozen=True)
class Downloaded:
    """A directory with a model, or its outline; `missing_bytes` are still on the hub.

    `source` names repository and commit; `origin` is the same if everybody may know it.
    """

    path: Path
    source: str
    origin: str | None
    missing_bytes: int


class Hub:
    """One download at a time, into `folder`."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self._folder = folder
        self._endpoint = endpoint
        self._turn = trio.Lock()

    @asynccontextmanager
    async def downloaded(
        self, text: str, inspect: Inspect, progress: Progress
    ) -> AsyncIterator[Downloaded]:
        """The model `hf:ORG/NAME[@REVISION]` as a directory; it is removed if the block ends well.

        Raises `Refused`.
        """
        reference = Reference.parse(text)
        async with self._turn:
            async with self._visit(reference) as visit:
                await visit.outline(inspect)
                found = await visit.complete(progress)
                await trio.to_thread.run_sync(visit.tidy)
            yield found
            await trio.to_thread.run_sync(_remove, found.path)

    @asynccontextmanager
    async def outlined(self, text: str, inspect: Inspect) -> AsyncIterator[Downloaded]:
        """What is known of the model without its weights; all of it if all is here.

        What this brings is removed, unless an earlier download had begun. Raises `Refused`.
        """
        reference = Reference.parse(text)
        async with self._turn:
            folder = self._folder / reference.folder
            known = folder.exists()
            try:
                async with self._visit(reference) as visit:
                    found = await visit.outline(inspect)
                    if found.missing_bytes == 0:
                        found = await visit.complete(silent)
                yield found
            finally:
                if not known:
                    with trio.CancelScope(shield=True):
                        await trio.to_thread.run_sync(_remove, folder)

    @asynccontextmanager
    async def _visit(self, reference: Reference) -> AsyncIterator["_Visit"]:
        if importlib.util.find_spec("huggingface_hub") is None:
            raise Refused(
                ErrorCode.NOT_ALLOWED,
                "this node cannot download from the hub",
                "huggingface_hub is not installed beside it",
                "Install it with `pip install 'blyan-node[hub]'`, or give a directory.",
                {"extra": "hub"},
            )
        folder = self._folder / reference.folder
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        async with hub_process(self._endpoint, self._folder / ".library") as process:
            listing = await process.look(reference.repository, reference.revision)
            yield _Visit(reference, folder, process, listing)


class _Visit:
    """One download: a folder, and a commit whose files it is to have."""

    def __init__(
        self, reference: Reference, folder: Path, process: HubProcess, listing: Listing
    ) -> None:
        self._reference = reference
        self._folder = folder
        self._process = process
        self._listing = listing
        self._files: Mapping[str, HubFile] = {file.name: file for file in listing.files}
        self._small = [name for name in sorted(self._files) if is_small(name)]
        self._weights: list[str] = []

    @property
    def _missing_bytes(self) -> int:
        """What is still on the hub of the files that are needed."""
        return sum(
            max(0, self._files[name].size - _length(self._partial(name)))
            for name in (*self._small, *self._weights)
        )

    def _found(self, path: Path) -> Downloaded:
        source = self._reference.at(self._listing.commit)
        origin = None if self._listing.private else source
        return Downloaded(path, source, origin, self._missing_bytes)

    async def outline(self, inspect: Inspect) -> Downloaded:
        """A directory with the small files, and of the weights their headers and sizes.

        Raises `Refused` if what `inspect` says is no, or there is no room. Of what is no model
        nothing is kept.
        """
        try:
            path = await self._outline()
            needed = await inspect(path)
        except Refused as refused:
            if refused.code is ErrorCode.BAD_MODEL:
                await trio.to_thread.run_sync(_remove, self._folder)
            raise
        self._make_sure_of_room(needed)
        return self._found(path)

    async def _outline(self) -> Path:
        self._check_small()
        await trio.to_thread.run_sync(self._take_up)
        for name in self._small:
            await self._process.get(name, self._partial(name), _nobody)
        outline = self._folder / OUTLINE
        await trio.to_thread.run_sync(self._copy_small, outline)
        self._weights = await trio.to_thread.run_sync(weight_files, outline, self._files)
        for name in self._weights:
            await self._begin(name)
            await trio.to_thread.run_sync(self._sketch, name, outline / name)
        return outline

    def _make_sure_of_room(self, stored: int) -> None:
        """Raises `DiskFull` if what is missing does not fit beside `stored` bytes of blocks."""
        missing, free = self._missing_bytes, shutil.disk_usage(self._folder).free
        if free < missing + stored + limits.disk_reserve_bytes:
            raise DiskFull(
                f"{missing} bytes are to be downloaded and {stored} stored; the disk has {free} "
                f"bytes free, of which {limits.disk_reserve_bytes} stay in reserve",
                f"{self._reference.repository} was not downloaded",
                path=str(self._folder),
                source=self._reference.at(self._listing.commit),
                download_bytes=missing,
                new_bytes=stored,
                room_bytes=max(0, free - limits.disk_reserve_bytes),
            )

    async def complete(self, progress: Progress) -> Downloaded:
        """The whole directory, every file checked."""
        names = [*self._small, *self._weights]
        total, what = sum(self._files[n].size for n in names), self._reference.repository
        before = 0
        for name in names:

            def tell(done: int, before: int = before) -> None:
                progress(before + done, total, f"downloading {what}")

            await self._process.get(name, self._partial(name), tell)
            before += self._files[name].size
        progress(total, total, f"downloading {what}")
        found = self._found(self._folder)
        for name in names:
            self._partial(name).rename(self._folder / name)
        return found

    def tidy(self) -> None:
        """Removes what is not of the model: an outline, files of another commit."""
        _remove(self._folder / OUTLINE)
        for path in self._folder.iterdir():
            if path.name not in {*self._small, *self._weights}:
                _remove(path)

    def _check_small(self) -> None:
        if len(self._small) > limits.model_files_max:
            refuse(f"{len(self._small)} files beside the weights, at most {limits.model_files_max}")
        for name in self._small:
            if self._files[name].size > limits.model_file_bytes_max:
                refuse(
                    f"{name} is too large: at most {limits.model_file_bytes_max} bytes", path=name
                )
        if "config.json" not in self._files:
            refuse(f"{self._reference.repository} has no config.json", path="config.json")

    def _take_up(self) -> None:
        """Whole files of an earlier run become partial ones again: they are to be checked."""
        for name, file in self._files.items():
            if not is_read(name):
                continue
            path = self._folder / name
            if _length(path) == file.size and path.is_file() and not self._partial(name).exists():
                path.rename(self._partial(name))

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.{self._files[name].hash[:16]}{PARTIAL}"

    def _copy_small(self, outline: Path) -> None:
        _remove(outline)
        outline.mkdir(mode=FOLDER_MODE)
        for name in self._small:
            shutil.copyfile(self._partial(name), outline / name)

    async def _begin(self, name: str) -> None:
        """Gets the header of a file of weights, and seldom much more."""
        path, size = self._partial(name), self._files[name].size
        await self._process.get(name, path, _nobody, min(size, limits.hub_outline_bytes))
        if (end := header_end(path, size)) > limits.hub_outline_bytes:
            await self._process.get(name, path, _nobody, end)

    def _sketch(self, name: str, sketch: Path) -> None:
        """A file with the header of the weights, their length, and holes for their bytes."""
        size = self._files[name].size
        with self._partial(name).open("rb") as source, sketch.open("wb") as file:
            file.write(source.read(header_end(self._partial(name), size)))
            file.truncate(size)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _nobody(done: int) -> None:
    """Hears of progress that nobody watches."""


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
