"""The index database: one writer at a time, and counters that are right in every batch.

Every change to the index goes through `Index.commit`, which puts the counters into the same atomic
batch. So what `stats` says in O(1) is what a count of the rows would say, after any crash.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from storage import keys
from storage.engine import Engine, Row


class Counters(NamedTuple):
    """What is here. `log` counts accepted blocks and is the last seq of the acceptance log."""

    log: int = 0
    staged: int = 0
    chunks: int = 0
    chunk_bytes: int = 0
    next_chunk: int = 0  # the seq that the next new chunk gets


class Index:
    """The index engine with its write lock and counters. Reading takes no lock."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lock = threading.RLock()
        raw = engine.get(keys.COUNTERS_KEY)
        self.counters = Counters() if raw is None else Counters(*keys.COUNTERS_VALUE.unpack(raw))

    def commit(
        self,
        puts: Iterable[Row],
        deletes: Sequence[bytes] = (),
        *,
        counters: Counters,
        sync: bool = True,
    ) -> None:
        """One atomic batch. The caller holds `lock` since it read `self.counters`.

        Without `sync` a power cut may undo it, but never without undoing what came later.
        """
        rows = [*puts, (keys.COUNTERS_KEY, keys.COUNTERS_VALUE.pack(*counters))]
        self.engine.batch(rows, deletes, sync=sync)
        self.counters = counters
