"""One home, one daemon: a file lock that the system gives back however the process ends."""

import fcntl
import os
from pathlib import Path

from storage.errors import StoreInUse


class Lock:
    """Holds `directory`/lock from construction to `release`; raises `StoreInUse`."""

    def __init__(self, directory: Path) -> None:
        self._fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._fd)
            raise StoreInUse(str(directory.parent), holder) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets another process open the store."""
        os.close(self._fd)
