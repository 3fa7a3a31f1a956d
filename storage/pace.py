"""How fast a store takes bytes: measured on a small store that is made for it and removed."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from protocols import limits
from protocols.tensors.manifest import Dtype
from storage.store import open_store

SAMPLE_BYTES = 64 * limits.MIB
FOLDER = "pace-trial"
_COUNTER_BYTES = 8
_one_at_a_time = threading.Lock()


def write_rate(
    directory: Path, size: int = SAMPLE_BYTES, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes a second at which a publish of `size` bytes is hashed, written, sorted and synced.

    A plain file would tell two or three times as much: the engine writes more than once. The store
    is made in `directory`, which is there, and is gone when this returns; what a killed process
    left of one goes first. Raises `OSError` and `DiskFull`.
    """
    folder = directory / FOLDER
    with _one_at_a_time:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        try:
            with open_store(folder) as store:
                begun = clock()
                with store.ingest() as ingest:
                    ingest.write_tensor("trial", Dtype.U8, (size,), _pieces(size))
                    ingest.flush()
                return size / max(clock() - begun, 1e-9)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _pieces(size: int) -> Iterator[bytes]:
    """`size` bytes of which no two chunks are alike."""
    noise = os.urandom(limits.chunk_bytes - _COUNTER_BYTES)
    for at in range(0, size, limits.chunk_bytes):
        yield (at.to_bytes(_COUNTER_BYTES, "big") + noise)[: size - at]
