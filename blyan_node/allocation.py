"""Heap that the C library keeps of what was freed, and when it is given back to the system.

To convert weights takes matrices of some MB that are freed again, between what is still used.
glibc keeps them for whoever needs memory next: 700 MB beside a model of 375. A fixed threshold for
mappings (M_MMAP_THRESHOLD) would leave nothing to keep. But then every activation of a prompt is
mapped and cleared anew, which took a sixth of its time.
"""

import ctypes
import logging
import platform
from collections.abc import Callable

import trio

from blyan_node.services.changes import Changes

log = logging.getLogger(__name__)

QUIET_S = 1.0  # many experts are loaded one after another


def give_back() -> bool:
    """Gives free heap back to the system; whether there was any. Takes some 70 ms for a GB.

    False where the C library is not glibc: nothing was done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0)))


async def give_back_after(freeing: Changes, give_back: Callable[[], object] = give_back) -> None:
    """Calls `give_back` in a thread whenever there was something of `freeing`, and then nothing."""
    seen = 0
    while True:
        seen, more = await freeing.wait(seen), True
        while more:
            with trio.move_on_after(QUIET_S) as quiet:
                seen = await freeing.wait(seen)
            more = not quiet.cancelled_caught
        await trio.to_thread.run_sync(give_back)
        log.debug("free memory was given back to the system")
