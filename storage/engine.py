"""Four verbs: everything that the store asks of a key-value engine.

There are two engines, `storage.leveldb` for nodes and `storage.memory` for tests, and one suite of
tests for both. Keys are ordered as bytes. A batch takes effect whole or not at all; with `sync` it
also outlives a power cut once the call returns, and with it every batch before it. An empty batch
with `sync` is how to make sure of those before.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

Row = tuple[bytes, bytes]


class Engine(Protocol):
    """An ordered map of bytes to bytes. Any thread may read; one at a time may write."""

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`, None if there is none. Raises `Corrupt` if it cannot be read."""

    def batch(
        self, puts: Sequence[Row], deletes: Sequence[bytes] = (), *, sync: bool = False
    ) -> None:
        """Writes `puts` and removes `deletes` atomically. Raises `DiskFull` or `Corrupt`.

        A batch that only deletes also gives the space back to the disk, which takes its time.
        """

    def iterate(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False
    ) -> Iterator[Row]:
        """The rows whose keys begin with `prefix`, as they are now, in order of keys.

        `start` is the first key that may come: upwards, or downwards with `reverse`.
        """

    def close(self) -> None:
        """Gives everything back; the engine is not used after it."""


def after_prefix(prefix: bytes) -> bytes | None:
    """The smallest key that is above every key with this prefix; None if there is no such key."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes((stem[-1] + 1,)) if stem else None
