"""Memory for weights that are not used where they were published, in large pages.

Weights are read from end to end for every token. From pages of 2 MiB that is a third faster than
from those of 4 KiB, but the system makes large ones only of what lies together: matrices of one
size share a mapping, as slots. What is freed is given back to the system at once, and its slot is
used again.
"""

import math
import mmap
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

LARGE_PAGE = 2 << 20
MAPPING_BYTES = 32 << 20  # of slots, or one slot
SLOTS_MAX = 64  # in one mapping: what is small stays small


@dataclass(eq=False)
class _Mapping:
    """Slots of one size, next to each other in memory that others do not see."""

    size: int  # of a slot, a multiple of the page's
    slots: int
    free: list[int] = field(init=False)
    _memory: mmap.mmap = field(init=False)
    _first: int = 0

    def __post_init__(self) -> None:
        self.free = list(range(self.slots))
        size, spare = self.size * self.slots, LARGE_PAGE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, size + spare, flags=flags)
        address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._first = -address % LARGE_PAGE
        self._advise("MADV_HUGEPAGE", self._first, size)

    def take(self, slot: int, size: int) -> memoryview:
        """The first bytes of a slot, which may lie in large pages again if it was cleared."""
        begin = self._first + slot * self.size
        self._advise("MADV_HUGEPAGE", begin, self.size)
        return memoryview(self._memory)[begin : begin + size]

    def clear(self, slot: int) -> None:
        """Gives the pages of a slot back; no large page is made of it and its neighbours."""
        begin = self._first + slot * self.size
        self._advise("MADV_DONTNEED", begin, self.size)
        self._advise("MADV_NOHUGEPAGE", begin, self.size)

    def _advise(self, advice: str, begin: int, size: int) -> None:
        with suppress(OSError, AttributeError):  # a system that does not know it needs no advice
            self._memory.madvise(getattr(mmap, advice), begin, size)


class Pages:
    """Memory of a process, taken matrix by matrix, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: dict[int, list[_Mapping]] = {}  # by size of slot
        self._returned: deque[tuple[_Mapping, int]] = deque()

    @property
    def mapped(self) -> int:
        """The bytes of all slots, in use or not."""
        with self._lock:
            self._collect()
            found = [one for mappings in self._mappings.values() for one in mappings]
            return sum(one.size * one.slots for one in found)

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix [rows, columns] whose values are whatever was there.

        Its memory is free again when nothing refers to it.
        """
        used = rows * columns * dtype.itemsize
        if not used:
            return torch.empty(rows, columns, dtype=dtype)
        size = math.ceil(used / mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            self._collect()
            mapping = self._with_room(size)
            slot = mapping.free.pop()
        view = mapping.take(slot, used)
        # It may be freed in the middle of anything, by a collection of garbage: without the lock.
        weakref.finalize(view, self._give_back, mapping, slot).atexit = False
        return torch.frombuffer(view, dtype=dtype).view(rows, columns)

    def _with_room(self, size: int) -> _Mapping:
        mappings = self._mappings.setdefault(size, [])
        for mapping in mappings:
            if mapping.free:
                return mapping
        mappings.append(_Mapping(size, max(1, min(SLOTS_MAX, MAPPING_BYTES // size))))
        return mappings[-1]

    def _give_back(self, mapping: _Mapping, slot: int) -> None:
        mapping.clear(slot)
        self._returned.append((mapping, slot))

    def _collect(self) -> None:
        """Takes up the slots that were freed; a mapping without any in use ends."""
        while self._returned:
            mapping, slot = self._returned.popleft()
            mapping.free.append(slot)
            if len(mapping.free) == mapping.slots:
                self._mappings[mapping.size].remove(mapping)
                if not self._mappings[mapping.size]:
                    del self._mappings[mapping.size]


pages = Pages()
