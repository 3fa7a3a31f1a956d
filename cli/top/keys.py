"""A terminal whose keys arrive one by one, unseen, and which is itself again afterwards."""

import os
import sys
import termios
from types import TracebackType
from typing import Self

_LFLAG = 3
_CHARACTERS = 6


class Keys:
    """Use it in a `with` block. Ctrl-C and Ctrl-Z are keys like any other meanwhile."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()

    def __enter__(self) -> Self:
        self._before = termios.tcgetattr(self._fd)
        mode = termios.tcgetattr(self._fd)
        mode[_LFLAG] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
        mode[_CHARACTERS][termios.VMIN], mode[_CHARACTERS][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSAFLUSH, mode)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)

    def fileno(self) -> int:
        """For `select`."""
        return self._fd

    def read(self) -> bytes:
        """The keys that were pressed; b"" once there is nobody to press any."""
        try:
            return os.read(self._fd, 1024)
        except OSError:  # the terminal is gone
            return b""
