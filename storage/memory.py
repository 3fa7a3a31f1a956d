"""The in-memory twin of the LevelDB engine: a sorted list of keys and a dictionary."""

import threading
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from storage.engine import Row, after_prefix


class MemoryEngine:
    """An `Engine` that forgets everything when it goes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    def get(self, key: bytes) -> bytes | None:
        """See `Engine.get`."""
        return self._values.get(key)

    def batch(
        self, puts: Sequence[Row], deletes: Sequence[bytes] = (), *, sync: bool = False
    ) -> None:
        """See `Engine.batch`."""
        with self._lock:
            for key, value in puts:
                if key not in self._values:
                    insort(self._keys, key)
                self._values[key] = value
            for key in deletes:
                if self._values.pop(key, None) is not None:
                    del self._keys[bisect_left(self._keys, key)]

    def iterate(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False
    ) -> Iterator[Row]:
        """See `Engine.iterate`."""
        with self._lock:
            low, high = 0, len(self._keys)
            end = after_prefix(prefix)
            low = bisect_left(self._keys, prefix)
            if end is not None:
                high = bisect_left(self._keys, end)
            if start is not None and reverse:
                high = min(high, bisect_left(self._keys, start + b"\0"))
            elif start is not None:
                low = max(low, bisect_left(self._keys, start))
            rows = [(key, self._values[key]) for key in self._keys[low:high]]
        return iter(reversed(rows) if reverse else rows)

    def close(self) -> None:
        """See `Engine.close`."""
