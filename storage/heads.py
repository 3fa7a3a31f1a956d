"""Heads with their history: which block every subject of a model had, at each root there ever was.

A change writes a row for each subject that changed and one for the new root, never the whole map.
The history row of a subject carries the log number from which it counts, its *version*; the heads
of a past root are, for each subject, the newest row that is not newer than the root's version.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from protocols.ids import BlockId, Root, Subject, model_root
from storage import keys
from storage.engine import Row
from storage.index import Index

Change = Mapping[BlockId, tuple[Mapping[Subject, BlockId], bytes]]
NO_RELEASE = bytes(36)


class ModelHeads(NamedTuple):
    """A model and the block of each of its subjects."""

    model: BlockId
    heads: Mapping[Subject, BlockId]


class Rows(NamedTuple):
    """What a change writes and removes."""

    puts: list[Row]
    deletes: list[bytes]


class HeadRows:
    """The rows about heads, with the current ones kept in memory once they were read."""

    def __init__(self, index: Index) -> None:
        self._engine = index.engine
        self._lock = index.lock
        self._current: dict[BlockId, Mapping[Subject, BlockId]] = {}

    def current(self, model: BlockId) -> Mapping[Subject, BlockId]:
        """The current block of each subject; empty for a model without a release."""
        heads = self._current.get(model)
        if heads is None:
            with self._lock:  # or a change between reading and keeping would be lost
                heads = self._current[model] = dict(self._read(model))
        return heads

    def at_version(self, model: bytes, version: int) -> dict[Subject, BlockId]:
        """The heads as they were when the log had `version` entries."""
        heads: dict[Subject, BlockId] = {}
        for key, id in self._engine.iterate(keys.PAST_HEAD.prefix(model)):
            row = keys.PAST_HEAD.parse(key)
            if row.version <= version:  # rows of a subject come in order of versions
                heads[keys.unpack_subject(row.subject)] = BlockId(id)
        return {subject: id for subject, id in heads.items() if id}

    def change(self, heads: Change, version: int) -> Rows:
        """The rows that turn the current heads of these models into new ones."""
        rows = Rows([], [])
        for model, (after, root) in heads.items():
            before = self.current(model)
            for subject, id in after.items():
                if before.get(subject) != id:
                    packed = keys.pack_subject(subject)
                    rows.puts.append((keys.HEAD.key(model, packed), id))
                    rows.puts.append((keys.PAST_HEAD.key(model, packed, version), id))
            for subject in before.keys() - after.keys():
                packed = keys.pack_subject(subject)
                rows.deletes.append(keys.HEAD.key(model, packed))
                rows.puts.append((keys.PAST_HEAD.key(model, packed, version), b""))
            value = keys.ROOT_VALUE.pack(model, version, NO_RELEASE)
            rows.puts.append((keys.ROOT.key(root), value))
        return rows

    def changed(self, heads: Change) -> None:
        """Tells that the rows of a change were written."""
        for model, (after, _) in heads.items():
            self._current[model] = dict(after)

    def _read(self, model: BlockId) -> Iterator[tuple[Subject, BlockId]]:
        for key, id in self._engine.iterate(keys.HEAD.prefix(model)):
            yield keys.unpack_subject(keys.HEAD.parse(key).subject), BlockId(id)


def release_root_row(model: BlockId, release: BlockId, subjects: Mapping[Subject, BlockId]) -> Row:
    """The row that makes the root of a release findable, whatever became head in between."""
    root: Root = model_root(model, subjects)
    return keys.ROOT.key(root), keys.ROOT_VALUE.pack(model, 0, release)
