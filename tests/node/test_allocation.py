"""A process keeps no heap of what was large and is freed."""

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from blyan_node import allocation

PIECE, PIECES = 1 << 20, 128
LOADING = f"""
import ctypes, os, sys
from blyan_node.allocation import give_back_what_is_large
from blyan_node.bench.footprint import own_bytes

if "given back" in sys.argv:
    assert give_back_what_is_large()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
libc.free(libc.malloc(16 << 20))  # the threshold grows with what is freed
before = own_bytes(os.getpid())
pieces = []
for _ in range({PIECES}):
    pieces.append(libc.malloc({PIECE}))
    ctypes.memset(pieces[-1], 1, {PIECE})
kept = libc.malloc({PIECE})  # so that the heap does not end with what is free
held = own_bytes(os.getpid())
for piece in pieces:
    libc.free(piece)
print(held - before, own_bytes(os.getpid()) - before)
"""


def _loaded(*arguments: str) -> tuple[int, int]:
    """What a process has of its own, in bytes: with the pieces of a load, and after it."""
    line = [sys.executable, "-c", LOADING, *arguments]
    held, left = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()
    return int(held), int(left)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_what_is_large_is_given_back_when_it_is_freed() -> None:
    held, left = _loaded("given back")
    assert held > PIECE * PIECES * 0.9  # else nothing was there to be freed
    assert left < PIECE * PIECES / 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_left_to_itself_the_c_library_keeps_it() -> None:
    """Else there is no need for what this module does."""
    _, left = _loaded()
    assert left > PIECE * PIECES / 2


STARTING = """
import sys
from pathlib import Path
import trio
from blyan_node import start
from blyan_node.settings import Settings

start.give_back_what_is_large = lambda: print("given back")
trio.run = lambda *_: print("served")
start.start(
    Path(sys.argv[1]), rpc=None, network=None, options=Settings(), as_json=False, verbose=False
)
"""


def test_a_daemon_does_so_before_it_serves(tmp_path: Path) -> None:
    line = [sys.executable, "-c", STARTING, str(tmp_path / "home")]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[-3:-1] == ["given back", "served"]


def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("asked it"))
    assert not allocation.give_back_what_is_large()


def test_another_c_library_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("asked it"))
    assert not allocation.give_back_what_is_large()
