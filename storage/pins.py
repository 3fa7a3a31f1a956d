"""Why a block's body is kept: what is pinned is never swept, and `fsck` expects it to be whole."""

import enum
from collections.abc import Iterator

from protocols.ids import BlockId
from storage import keys
from storage.index import Index


class Pin(enum.IntEnum):
    """A reason to keep the body of a block."""

    PUBLISHED = 1  # by this node
    HELD = 2  # loaded here, for others to use
    FETCHED = 3  # asked for by a person
    WANTED = 4  # was here, was found broken, is to come back; the only one that promises nothing


class Pins:
    """The pins of every block."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def add(self, blocks: list[BlockId], reason: Pin) -> None:
        """Pins blocks in one batch; what was wanted no longer is."""
        deletes = [] if reason is Pin.WANTED else [keys.PIN.key(b, Pin.WANTED) for b in blocks]
        with self._index.lock:
            puts = [(keys.PIN.key(b, reason), b"") for b in blocks]
            self._index.commit(puts, deletes, counters=self._index.counters)

    def remove(self, blocks: list[BlockId], reason: Pin) -> None:
        """Takes one reason away."""
        with self._index.lock:
            deletes = [keys.PIN.key(block, reason) for block in blocks]
            self._index.commit([], deletes, counters=self._index.counters)

    def of(self, block: BlockId) -> set[Pin]:
        """The reasons for which a block is kept."""
        rows = self._index.engine.iterate(keys.PIN.prefix(block))
        return {Pin(keys.PIN.parse(key).reason) for key, _ in rows}

    def every(self) -> Iterator[tuple[BlockId, Pin]]:
        """Each pin of each block."""
        for key, _ in self._index.engine.iterate(keys.PIN.prefix()):
            row = keys.PIN.parse(key)
            yield BlockId(row.id), Pin(row.reason)
