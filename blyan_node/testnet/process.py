"""Daemons as processes: started apart from us, told from strangers that got their number later.

A process is known by its id and the time at which it started. An id alone may by now belong to
somebody else, and is never sent a signal.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.05


@dataclass(frozen=True)
class Process:
    """A process id and when it started, in the words of the system."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return start_time(self.pid) == self.started

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, if this very process still runs."""
        if self.alive:
            # It may end in between, which is what a signal is for.
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def start_time(pid: int) -> str | None:
    """When a process started; None if there is none, or if it has ended and is not yet reaped."""
    try:
        # The name in parentheses may hold anything; the fields after it are numbers.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except ProcessLookupError:
        return None
    found = subprocess.run(
        ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, started = found.stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else started.strip()


def spawn(arguments: Sequence[str], log: Path) -> Process:
    """Starts `python -m blyan_node …` in a session of its own, its output appended to `log`."""
    with log.open("ab") as output:
        child = subprocess.Popen(
            [sys.executable, *_safe_path(), "-m", "blyan_node", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _CHILDREN.append(child)
    return Process(child.pid, start_time(child.pid) or "")


@contextmanager
def interrupt_later() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, then raises `KeyboardInterrupt`."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


# Kept so that a child which ends while we watch is reaped and not taken for alive.
_CHILDREN: list[subprocess.Popen[bytes]] = []


def reap() -> None:
    """Collects children of ours that have ended."""
    for child in _CHILDREN:
        child.poll()


def end(processes: Iterable[Process], *, patience_s: float) -> None:
    """SIGTERM, then SIGKILL for those that are still there; returns when all are gone."""
    left = [process for process in processes if process.alive]
    for process in left:
        process.signal(signal.SIGTERM)
    left = wait_for_end(left, patience_s)
    for process in left:
        process.signal(signal.SIGKILL)
    wait_for_end(left, patience_s)


def wait_for_end(processes: Iterable[Process], patience_s: float) -> list[Process]:
    """Waits until all have ended; those that have not when patience runs out."""
    left, deadline = list(processes), time.monotonic() + patience_s
    while left and time.monotonic() < deadline:
        reap()
        left = [process for process in left if process.alive]
        if left:
            time.sleep(POLL_S)
    return left


def _safe_path() -> list[str]:
    return ["-P"] if sys.flags.safe_path else []
