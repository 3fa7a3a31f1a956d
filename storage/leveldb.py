"""The engine on disk: LevelDB through plyvel. The only importer of plyvel.

Weights do not compress, so compression is off; big write buffers and files keep LevelDB from
writing the same bytes several times. Reads verify LevelDB's own checksums.
"""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import plyvel

from storage.engine import Row, after_prefix
from storage.errors import FULL, Corrupt, DiskFull

SORT_RATHER_THAN_SYNC_BYTES = 16 << 20
_FULL = tuple(os.strerror(code) for code in FULL)


class LevelDBEngine:
    """An `Engine` in the directory `path`, which is made if it is not there.

    `buffer_bytes` is both what is gathered in memory before it is sorted into a file and how large
    such a file grows. After a failed write the engine takes no more until it is opened again:
    LevelDB would append behind a torn record, and what comes behind one can be lost.
    """

    def __init__(self, path: Path, *, buffer_bytes: int, cache_bytes: int) -> None:
        self._path = path
        self._failed: str | None = None
        self._unsynced = 0  # bytes that came in batches without sync
        self._write = threading.Lock()
        try:
            self._db: Any = plyvel.DB(
                str(path),
                create_if_missing=True,
                compression=None,
                write_buffer_size=buffer_bytes,
                max_file_size=buffer_bytes,
                lru_cache_size=cache_bytes,
            )
        except plyvel.Error as error:
            raise _told(error, path) from error

    def get(self, key: bytes) -> bytes | None:
        """See `Engine.get`."""
        try:
            value: bytes | None = self._db.get(key, verify_checksums=True)
        except plyvel.Error as error:
            raise _told(error, self._path) from error
        return value

    def batch(
        self, puts: Sequence[Row], deletes: Sequence[bytes] = (), *, sync: bool = False
    ) -> None:
        """See `Engine.batch`."""
        with self._write:
            if self._failed is not None:
                raise DiskFull(f"an earlier write failed ({self._failed}); restart the node")
            try:
                self._write_rows(puts, deletes, sync)
                self._make_durable(sync, sum(len(value) for _, value in puts))
            except (plyvel.Error, OSError) as error:
                self._failed = str(error)
                raise _told(error, self._path) from error
            if deletes and not puts:
                # Else LevelDB gives the space back at some later time, which may never come.
                self._db.compact_range(start=min(deletes), stop=max(deletes))

    def _write_rows(self, puts: Sequence[Row], deletes: Sequence[bytes], sync: bool) -> None:
        if len(puts) == 1 and not deletes:  # copied without the GIL
            self._db.put(*puts[0], sync=sync)
            return
        batch = self._db.write_batch(sync=sync)
        for key, value in puts:
            batch.put(key, value)
        for key in deletes:
            batch.delete(key)
        batch.write()

    def _make_durable(self, sync: bool, size: int) -> None:
        """Keeps what `sync` promises for the batches before, which LevelDB does not.

        LevelDB syncs the log that it writes to now, and not an older one that it has left without
        sync. Where much was written, sorting it into a synced file costs half as much as syncing
        the log first: the log is then deleted and never reaches the disk.
        """
        self._unsynced += size
        if not sync:
            return
        if self._unsynced > SORT_RATHER_THAN_SYNC_BYTES:
            self._db.compact_range(start=b"\xff" * 64, stop=b"\xff" * 64)
        elif self._unsynced > size:
            for log in self._path.glob("*.log"):
                _sync_file(log)
        self._unsynced = 0

    def iterate(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False
    ) -> Iterator[Row]:
        """See `Engine.iterate`."""
        low, high = prefix, after_prefix(prefix)
        if start is not None and reverse:
            high = start + b"\0" if high is None else min(high, start + b"\0")
        elif start is not None:
            low = max(low, start)
        # plyvel 1.5.1, going down, skips a single row that equals `start`: bound it here instead.
        rows = self._db.iterator(
            start=None if reverse else low, stop=high, reverse=reverse, verify_checksums=True
        )
        try:
            with rows:
                for key, value in rows:
                    if key < low:
                        break
                    yield key, value
        except plyvel.Error as error:
            raise _told(error, self._path) from error

    def close(self) -> None:
        """See `Engine.close`."""
        self._db.close()


def repair(path: Path) -> None:
    """Makes a damaged LevelDB open again, with what can still be read."""
    plyvel.repair_db(str(path), paranoid_checks=True, compression=None)  # or damage stays unseen


def _sync_file(path: Path) -> None:
    """Forces a file to disk; one that is gone was sorted into a synced file before it went."""
    with contextlib.suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _told(error: Exception, path: Path) -> DiskFull | Corrupt | OSError:
    said = error.args[0] if error.args else ""
    text = said.decode(errors="replace") if isinstance(said, bytes) else str(error)
    if any(reason in text for reason in _FULL):
        return DiskFull(text[:200])
    if isinstance(error, plyvel.CorruptionError):
        return Corrupt(f"{path.name} is damaged", text[:200], path=str(path))
    return OSError(f"{path}: {text[:200]}")
