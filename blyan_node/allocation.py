"""How the C library hands memory that a process has freed back to the system.

glibc takes what is large from the system piece by piece, and gives it back when it is freed. But
with each such piece that is freed, the size from which this is so grows, up to 32 MiB. A load
copies matrices of some MB and frees them, after which what is freed stays in the heap, between
what is still used: 700 MB beside a model of 375. A threshold that was set by hand does not grow.
"""

import ctypes
import os
import platform

LARGE_BYTES = 128 << 10  # glibc's own, before it grows; with 1 MiB 400 of the 700 MB stay

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_OPERATORS = "MALLOC_MMAP_THRESHOLD_"


def give_back_what_is_large() -> bool:
    """Has memory of `LARGE_BYTES` and more given back whenever it is freed, from now on.

    For a whole process, so for whoever starts one. False where the C library is not glibc, or the
    operator has set its threshold in the environment: nothing was changed.
    """
    if platform.libc_ver()[0] != "glibc" or _OPERATORS in os.environ:
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))
