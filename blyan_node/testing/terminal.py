"""A command in a terminal of its own, as somebody sits before it: what is typed, what is shown."""

import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Self

CTRL_C, CTRL_D = "\x03", "\x04"
SHOWS_S_MAX = 60
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """`blyan-node` on a pseudo-terminal, in a `with` block that ends it if the test has not.

    `term` is what kind it is; a dumb one can move no cursor. `size` is in lines and columns.
    """

    def __init__(
        self, *words: object, term: str = "dumb", size: tuple[int, int] = (0, 0), **env: str
    ) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, size)
        self._mode = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *map(str, words)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_take_terminal,  # what is typed as Ctrl-C is then a signal for it
            env={**_outside(), "TERM": term, **env},
        )
        os.close(theirs)
        self._raw = b""
        self._seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    @property
    def shown(self) -> str:
        """All that was shown, without codes for the cursor and colours."""
        return _CODES.sub("", self._raw.decode(errors="replace"))

    def press(self, key: str) -> None:
        """One key for a command that reads keys by itself."""
        os.write(self._ours, key.encode())

    @property
    def codes(self) -> str:
        """All that was shown, codes included."""
        return self._raw.decode(errors="replace")

    @property
    def as_it_was(self) -> bool:
        """Whether keys are taken and shown as before the command, on the screen of before."""
        rows = ("\x1b[?1049h", "\x1b[?1049l"), ("\x1b[?25l", "\x1b[?25h")
        shown = all(self.codes.rfind(off) >= self.codes.rfind(on) for on, off in rows)
        return shown and termios.tcgetattr(self._ours) == self._mode

    def type(self, text: str) -> None:
        """Presses these keys. Ctrl-C only once the command waits for something to happen.

        Python's line editor would not notice it before the next key, while it still draws a line.
        """
        while text == CTRL_C and not self._waits():
            os.sched_yield()
        os.write(self._ours, text.encode())

    def until(self, text: str) -> str:
        """Waits for `text` behind what was waited for before; what came up to its end."""
        deadline = time.monotonic() + SHOWS_S_MAX
        while (at := self.shown.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, self.shown
            assert self._read(), self.shown
        before, self._seen = self._seen, at + len(text)
        return self.shown[before : self._seen]

    def ends(self) -> int:
        """Waits for the end of the command; its exit code."""
        while self._read():
            pass
        return self.process.wait(SHOWS_S_MAX)

    def _waits(self) -> bool:
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] == "S"

    def _read(self) -> bool:
        ready, _, _ = select.select([self._ours], [], [], SHOWS_S_MAX)
        assert ready, self.shown
        try:
            data = os.read(self._ours, 65536)
        except OSError:  # how Linux tells that nobody has the other end any more
            data = b""
        self._raw += data
        return bool(data)


def _outside() -> dict[str, str]:
    """Our environment without the size of another terminal, which readline leaves to children."""
    return {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
