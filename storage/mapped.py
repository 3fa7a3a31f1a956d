"""Letting go of memory that belongs to files.

LevelDB maps its files, so whatever is read of them stays resident until the system wants it back: a
node that has exported a model would look as large as the model. After a long reading the pages are
given back at once (`MADV_PAGEOUT`, Linux 5.4 and later); what is needed again is read again. The
advice harms nothing, even if LevelDB has just put something else at the address.
"""

import ctypes
from pathlib import Path

MADV_PAGEOUT = 21
_MAPS = Path("/proc/self/maps")


def let_pages_go(directory: Path) -> bool:
    """Gives back the memory of mapped files in `directory`; False where that cannot be done."""
    try:
        advise = ctypes.CDLL(None).madvise
        lines = _MAPS.read_bytes().splitlines()
    except (OSError, AttributeError):  # this is not Linux
        return False
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    within = b" " + bytes(directory.resolve()) + b"/"
    done = True
    for line in lines:
        if within in line:
            first, last = (int(text, 16) for text in line.split(b" ", 1)[0].split(b"-"))
            done &= advise(first, last - first, MADV_PAGEOUT) == 0
    return done
