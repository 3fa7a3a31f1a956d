"""`idle`: what a daemon costs that has nothing to do."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from blyan_node.bench.nets import running_net
from blyan_node.bench.rows import Row, row

WATCH_S = 30
SETTLE_S = 10


def measure() -> list[Row]:
    """Memory beyond a process that has only imported torch, and the share of a core."""
    torch = resident_of_torch()
    # A second node, so that heartbeats, gossip and pings go on as they do in a network.
    with (
        tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch,
        running_net(Path(scratch) / "net", ["main", "gpu"]) as net,
    ):
        pid = net["alice"].pid
        assert pid is not None
        time.sleep(SETTLE_S)
        memory = resident_bytes(pid)
        started, used = time.monotonic(), cpu_s(pid)
        time.sleep(WATCH_S)
        share = (cpu_s(pid) - used) / (time.monotonic() - started)
    megabyte = 1e6
    return [
        row(
            "idle",
            "MB resident beyond torch",
            (memory - torch) / megabyte,
            beside={"import torch": torch / megabyte},
            goal="< 200",
            runs=1,
        ),
        row("idle", "% of a core", 100 * share, beside={}, goal="< 2", runs=1),
    ]


def resident_of_torch() -> int:
    """Bytes resident in a Python that has imported torch."""
    program = "import torch, sys; print(open('/proc/self/statm').read()); sys.stdout.flush()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    return int(done.stdout.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
