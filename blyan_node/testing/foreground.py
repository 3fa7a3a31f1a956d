"""One daemon, and one command against it, as processes of the test that are signalled and read."""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from blyan_node.testing.daemons import Node, blyan

ENDS_S_MAX = 10  # the contract for a daemon that is told to stop
SAYS_S_MAX = 60


class Foreground:
    """`blyan-node start` in the foreground; a `with` block that ends it if the test has not."""

    def __init__(self, home: Path, *options: object) -> None:
        self.home = home
        self.log = home.parent / f"{home.name}.log"
        words = ["start", "--home", home, "--listen", "/ip4/127.0.0.1/tcp/0"]
        words += ["--threads", 1, "--device", "cpu"]  # the bits that tests compare with
        self.process = subprocess.Popen(
            _command(*words, *options, "--json"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self._copying = threading.Thread(target=self._copy, daemon=True)
        self._ready: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._copying.start()

    def __enter__(self) -> Node:
        ready = self._ready.get(timeout=SAYS_S_MAX)
        assert ready is not None, self.log.read_text()[-3000:]
        return Node(
            self.home.name, self.home, ready["rpc"], ready["peer_id"], ready["addrs"],
            self.process.pid, ready["role"],
        )  # fmt: skip

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._copying.join()

    def ends(self) -> None:
        """Waits for the end that it was told to come to: in time, with 0, without a traceback."""
        code = self.process.wait(ENDS_S_MAX)
        self._copying.join()
        said = self.log.read_text()
        assert code == 0, said[-3000:]
        assert "Traceback" not in said, said[-3000:]
        assert "not drained" not in said, said[-3000:]

    def fsck(self) -> dict[str, Any]:
        """What `fsck` says of the home; the daemon is down."""
        report: dict[str, Any] = blyan("fsck", "--home", self.home)
        return report

    def _copy(self) -> None:
        """What the daemon says goes to the log; nothing that it says may block it."""
        assert self.process.stdout is not None
        with self.process.stdout as lines, self.log.open("ab", buffering=0) as log:
            for line in lines:
                log.write(line)
                if b'"event": "ready"' in line:
                    self._ready.put(json.loads(line))
        self._ready.put(None)


@dataclass
class Command:
    """A command that runs; `out` and `err` are what it has written so far."""

    process: subprocess.Popen[bytes]
    out: bytes = b""
    err: bytes = b""

    def until(self, said: bytes, act: Callable[[], None] = lambda: None) -> Self:
        """Reads on until `said` is on stdout or stderr; does `act` whenever nothing comes."""
        deadline = time.monotonic() + SAYS_S_MAX
        while said not in self.out and said not in self.err:
            assert time.monotonic() < deadline, (self.out, self.err)
            if not self._read(1):
                assert self.process.poll() is None, (self.out, self.err)
                act()
        return self

    def interrupted(self) -> int:
        """Ctrl-C, everything that is still said, and the exit code."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=SAYS_S_MAX)
        self.out += out
        self.err += err
        return self.process.returncode

    def _read(self, patience_s: float) -> bool:
        out, err = self.process.stdout, self.process.stderr
        assert out is not None and err is not None
        ready, _, _ = select.select([out, err], [], [], patience_s)
        pieces = {file: os.read(file.fileno(), 65536) for file in ready}
        self.out += pieces.get(out, b"")
        self.err += pieces.get(err, b"")
        return any(pieces.values())


@contextmanager
def command(node: Node, *arguments: object) -> Iterator[Command]:
    """Starts a command against `node` as in a terminal, but without one."""
    process = subprocess.Popen(
        _command("--rpc", node.rpc, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        try:
            yield Command(process)
        finally:
            process.kill()


def _command(*words: object) -> list[str]:
    return [sys.executable, "-m", "cli.main", *map(str, words)]
