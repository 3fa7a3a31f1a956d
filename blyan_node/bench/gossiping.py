"""`gossip-16`: how long a gossiped header takes to reach all of 16 nodes on one machine."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec

from blyan_node.bench.rows import Row, row

NODES = 16
MESSAGES = 30
SETTLE_S = 5  # heartbeats in which the mesh takes shape
CONNECT_S_MAX = 90
ARRIVE_S_MAX = 10


class Node:
    """A `gossip_node` process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.addr: str = self._read()

    def ask(self, line: str) -> Any:
        """Sends a line and waits for the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return msgspec.json.decode(self._process.stdout.readline())


def measure() -> list[Row]:
    """The 95th percentile over all deliveries; a message that does not arrive fails the run."""
    with ExitStack() as stack:
        first = stack.enter_context(_node())
        others = [stack.enter_context(_node(first.addr)) for _ in range(NODES - 1)]
        _until(lambda: all(n.ask("peers") == NODES - 1 for n in (first, *others)), CONNECT_S_MAX)
        time.sleep(SETTLE_S)
        asked = statistics.median(first.ask("ask"))
        first.ask(f"publish {MESSAGES}")
        _until(lambda: all(len(n.ask("heard")) == MESSAGES for n in others), ARRIVE_S_MAX)
        delays = sorted(delay for node in others for delay in node.ask("heard"))
    beside = {"one request and reply between two of them": asked}
    p95 = statistics.quantiles(delays, n=20)[-1]
    return [row("gossip-16", "s (p95)", p95, beside=beside, goal="< 0.5 s", runs=len(delays))]


@contextmanager
def _node(*bootstrap: str) -> Iterator[Node]:
    command = [sys.executable, "-m", "blyan_node.bench.gossip_node", *bootstrap]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        try:
            yield Node(process)
        finally:
            process.stdin.close()


def _until(holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the nodes were not ready after {timeout_s} s")
        time.sleep(0.2)
