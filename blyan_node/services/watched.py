"""Long work on a worker thread: tells the event loop how far it is, and notices that it is over."""

from collections.abc import Iterator

import trio

from blyan_node.services.supply import Progress
from protocols import limits

PROGRESS_BYTES = 8 * limits.MIB


class Watched:
    """Counts bytes on a thread that `trio.to_thread.run_sync` started.

    The event loop hears of it at most once in `PROGRESS_BYTES`, and of the end. `add` and `end`
    raise `trio.Cancelled` if nobody waits for the work any more.
    """

    def __init__(self, progress: Progress, total: int, what: str) -> None:
        self.total = total
        self._progress = progress
        self._what = what
        self._done = 0
        self._told = 0

    def add(self, count: int) -> None:
        """Counts `count` more bytes."""
        self._done += count
        if self._done - self._told >= PROGRESS_BYTES:
            self._tell()

    def counted(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """The same pieces, each counted once it was taken."""
        for piece in pieces:
            yield piece
            self.add(len(piece))

    def end(self) -> None:
        """Tells the last count."""
        self._tell()

    def _tell(self) -> None:
        self._told = self._done
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(self._progress, self._done, self.total, self._what)
