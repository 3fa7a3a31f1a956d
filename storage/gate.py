"""A gate: any number are inside at once, or one keeps all others out."""

import contextlib
import threading
from collections.abc import Iterator


class Gate:
    """Counts who is inside. Any thread may call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0  # -1: it is closed

    def enter(self) -> None:
        """Waits until the gate is open, and goes in."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside >= 0)
            self._inside += 1

    def leave(self) -> None:
        """Goes out."""
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def closed(self) -> Iterator[bool]:
        """Keeps everybody out; False, and nobody is kept out, if somebody is inside."""
        with self._changed:
            alone = self._inside == 0
            self._inside -= alone
        try:
            yield alone
        finally:
            with self._changed:
                self._inside += alone
                self._changed.notify_all()
