"""Sizes as people write them, and the memory that the machine has free."""

import os
import re
from pathlib import Path

from protocols.errors import RemoteProtocolError

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"(\d{1,15})(?:\.(\d{1,6}))? ?([A-Za-z]{0,3})", re.ASCII)
SIZE_MAX = 2**60


def parse_size(value: str | int) -> int:
    """Bytes of `8GiB`, `1.5 GB` or a plain number; raises `RemoteProtocolError`."""
    match = _SIZE.fullmatch(str(value).strip())
    if match and match[3].upper() in _UNITS:
        whole, part, unit = match[1], match[2] or "", _UNITS[match[3].upper()]
        size = int(whole + part) * unit // int(10 ** len(part))
        if size <= SIZE_MAX:
            return size
    raise RemoteProtocolError("size", f"{str(value)[:40]!r} is no size; write it like 8GiB")


def free_memory_bytes() -> int:
    """Memory that a new process could take now without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):  # not Linux: the next best answer is below
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
