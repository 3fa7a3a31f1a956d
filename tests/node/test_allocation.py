"""A process gives back what its loads have freed, once they are over."""

import ctypes
import platform
import subprocess
import sys

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from blyan_node import allocation
from blyan_node.allocation import QUIET_S, give_back_after
from blyan_node.services.changes import Changes
from blyan_node.services.memory import Memory

PIECE, PIECES = 1 << 20, 128
LOADING = f"""
import ctypes, os, sys
from blyan_node.allocation import give_back
from blyan_node.bench.footprint import own_bytes

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
libc.free(libc.malloc(16 << 20))  # the size from which it maps grows with what is freed
before = own_bytes(os.getpid())
pieces = []
for _ in range({PIECES}):
    pieces.append(libc.malloc({PIECE}))
    ctypes.memset(pieces[-1], 1, {PIECE})
kept = libc.malloc({PIECE})  # so that the heap does not end with what is free
for piece in pieces:
    libc.free(piece)
freed = own_bytes(os.getpid())
assert give_back()
print(freed - before, own_bytes(os.getpid()) - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_the_c_library_keeps_of_what_is_free_is_given_back() -> None:
    line = [sys.executable, "-c", LOADING]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    kept, left = map(int, done.stdout.split())
    assert kept > PIECE * PIECES * 0.9  # else there was nothing to give back
    assert left < PIECE * PIECES / 4


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("asked it"))
    assert not allocation.give_back()


def test_it_is_done_once_when_loads_are_over() -> None:
    clock = MockClock()
    trio.run(_loads, clock, clock=clock)


async def _loads(clock: MockClock) -> None:
    freeing, times = Changes(), list[float]()

    def note() -> None:
        times.append(trio.from_thread.run_sync(trio.current_time))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_back_after, freeing, note)
        for count in (1, 2):
            await wait_all_tasks_blocked()
            began = trio.current_time()
            for _ in range(3):  # one load soon after another
                freeing.tell()
                await wait_all_tasks_blocked()
                clock.jump(QUIET_S / 2)
                await wait_all_tasks_blocked()
            assert len(times) == count - 1
            clock.jump(QUIET_S / 2)
            while len(times) < count:
                await trio.lowlevel.checkpoint()
            assert times[-1] == began + 2 * QUIET_S
        nursery.cancel_scope.cancel()


def test_only_loads_that_copy_are_told_of() -> None:
    memory = Memory(1 << 20)
    memory.copies(0)
    assert memory.copying.count == 0
    memory.copies(5)
    memory.copies(7)
    assert (memory.copied, memory.copying.count) == (12, 2)
