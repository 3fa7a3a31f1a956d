"""How fast a disk takes bytes: measured with a file that never gets a name."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from protocols import limits

SAMPLE_BYTES = 64 * limits.MIB
_PIECE_BYTES = 4 * limits.MIB


def write_rate(
    directory: Path, size: int = SAMPLE_BYTES, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Bytes a second at which `size` random bytes are written under `directory` and synced.

    The file has no name and is gone when this returns. Raises `OSError`.
    """
    piece = os.urandom(min(size, _PIECE_BYTES))
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        begun, left = clock(), size
        while left > 0:
            left -= file.write(piece[:left])
        os.fsync(file.fileno())
        return size / max(clock() - begun, 1e-9)
