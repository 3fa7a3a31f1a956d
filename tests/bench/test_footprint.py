"""Whose memory it is: own pages, packs, LevelDB's files, programs."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

from blyan_node.bench.footprint import Peaks, footprint, own_bytes

SIZE = 32 << 20
SLACK = 4 << 20


def _own_pages() -> mmap.mmap:
    """Fresh memory of this process: what malloc gives may have been resident before."""
    pages = mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.write(b"x" * SIZE)
    return pages


def test_pages_count_for_what_they_are_from(tmp_path: Path) -> None:
    before = footprint(os.getpid())
    opened = []
    for name in ("one.pack", "000001.ldb", "one.so"):
        (tmp_path / name).write_bytes(b"x" * SIZE)
        with (tmp_path / name).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ)
        assert mapped[:: mmap.PAGESIZE].count(b"x") == SIZE // mmap.PAGESIZE
        opened.append(mapped)
    (tmp_path / "one.pack").unlink()  # what is let go is mapped until its last user is done
    copied = _own_pages()
    after = footprint(os.getpid())
    for what in ("own", "packs", "tables", "programs"):
        assert abs(getattr(after, what) - getattr(before, what) - SIZE) < SLACK, what
    assert after.total == after.own + after.packs + after.tables + after.programs
    assert abs(own_bytes(os.getpid()) - after.own) < SLACK
    assert len(copied) == SIZE and all(mapped.close() is None for mapped in opened)


HOLDER = f"""
import mmap, sys
sys.stdin.readline()
pages = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _ in range({SIZE >> 12}):
    pages.write(b"x" * 4096)
print("held", flush=True)
sys.stdin.readline()
pages.close()
print("let go", flush=True)
sys.stdin.readline()
"""


def test_a_peak_is_seen_that_is_over() -> None:
    """Of a process that does nothing else: here, what other tests left may go at any time."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None

        def go_on() -> None:
            assert holder.stdin is not None
            holder.stdin.write(b"\n")
            holder.stdin.flush()

        pids = {"holder": holder.pid, "nobody": 2**22 + 1}
        with Peaks(pids, every_s=0.001) as peaks:
            go_on()
            assert holder.stdout.readline() == b"held\n"
            seen = peaks.seen
            while peaks.seen < seen + 2:
                pass
            go_on()
            assert holder.stdout.readline() == b"let go\n"
            after = own_bytes(holder.pid)
        holder.stdin.close()
    assert abs(peaks.peak["holder"] - after - SIZE) < SLACK
    assert peaks.peak["nobody"] == 0
