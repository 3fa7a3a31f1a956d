"""About how long a publish would take, from two rates that were measured on this machine just now.

A publish reads and hashes on one thread while another writes, so it takes about as long as the
slower of the two. How fast reading and hashing is, the dry run has found out on the very bytes;
how fast a store takes bytes, a small one tells that is made on the same disk and removed. A disk
that is slower for much than for little makes the publish take longer than this.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from blyan_node.services.publish import Rehearsal
from storage.errors import DiskFull
from storage.pace import SAMPLE_BYTES, write_rate


@dataclass(frozen=True)
class Pace:
    """Seconds that a publish would take, and the rates behind it; None where nothing is known."""

    seconds: float | None
    read_bytes_per_s: int
    write_bytes_per_s: int | None


async def estimate(found: Rehearsal, scratch: Path) -> Pace:
    """About how long the publish of `found` takes; `scratch` is a folder on the store's disk."""
    read = int(found.bytes / max(found.seconds, 1e-9))
    if found.new_bytes == 0:
        return Pace(found.seconds, read, None)
    sample = min(found.new_bytes, SAMPLE_BYTES)
    try:
        write = await trio.to_thread.run_sync(partial(write_rate, scratch, sample))
    except (OSError, DiskFull):  # no room for the sample: then there is no estimate
        return Pace(None, read, None)
    return Pace(max(found.seconds, found.new_bytes / write), read, int(write))
