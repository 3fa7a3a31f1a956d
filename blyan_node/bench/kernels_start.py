"""`kernels-start`: what the kernels cost a daemon when it starts, and keep.

Every start is a process of its own that has imported torch already: this module run by itself, as
`python -m blyan_node.bench.kernels_start FOLDER`, starts once with the machine code kept in FOLDER
and prints what it took as one line of JSON.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import torch  # noqa: F401  (a daemon has it whatever computes)

from blyan_node.bench.footprint import own_bytes
from blyan_node.bench.rows import Row, row

RUNS = 5
AT_ONCE = 6
_MIB = 1 << 20

GOALS = {
    "load_cpu_s": "once a machine, then next to nothing",
    "load_s": "no daemon waits for another",
    "bytes": "own pages, LLVM's included; small beside torch",
}


class Start(msgspec.Struct, frozen=True):
    """Seconds and own memory of one start: importing the compiler, then the kernels."""

    import_s: float
    load_s: float  # on the clock
    load_cpu_s: float
    bytes: int


def measure() -> list[Row]:
    """Cold and from kept code, one process and six at once, and the memory of each."""
    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        cold, kept = [], []
        for number in range(RUNS):
            folder = Path(scratch, str(number))
            cold += start_together(folder, 1)
            kept += start_together(folder, 1)
        many_cold = start_together(Path(scratch, "many"), AT_ONCE)
        many_kept = start_together(Path(scratch, "many"), AT_ONCE)
    importing = statistics.median(start.import_s for start in kept)

    def made(name: str, starts: list[Start], kind: str, beside: dict[str, float]) -> Row:
        unit = "MiB" if kind == "bytes" else "ms"
        factor = 1 / _MIB if kind == "bytes" else 1e3
        values = [factor * float(getattr(start, kind)) for start in starts]
        value = max(values) if len(starts) == AT_ONCE else statistics.median(values)
        goal = f"{GOALS[kind]}{'; the slowest' if len(starts) == AT_ONCE else ''}"
        return row(f"kernels-start {name}", unit, value, beside=beside, goal=goal, runs=len(starts))

    first = made("cold", cold, "load_cpu_s", {"importing llvmlite": 1e3 * importing})
    second = made("kept", kept, "load_cpu_s", {"cold": first.value})
    third = made("cold, memory", cold, "bytes", {})
    return [
        first,
        second,
        made(f"cold, {AT_ONCE} at once", many_cold, "load_s", {"one": first.value}),
        made(f"kept, {AT_ONCE} at once", many_kept, "load_s", {"one": second.value}),
        third,
        made("kept, memory", kept, "bytes", {"cold": third.value}),
    ]


def start_together(folder: Path, count: int) -> list[Start]:
    """So many processes that start at once with the machine code of `folder`."""
    line = [sys.executable, "-m", "blyan_node.bench.kernels_start", str(folder)]
    started = [
        subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(count)
    ]
    for process in started:  # all have imported torch
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    return [msgspec.json.decode(process.communicate()[0], type=Start) for process in started]


def start(folder: Path) -> Start:
    """Imports the compiler and loads the kernels, in this process."""
    before, began = own_bytes(os.getpid()), time.perf_counter()
    import llvmlite.binding  # noqa: F401

    imported = time.perf_counter()
    from blyan_node.moe.kernels.library import load

    loading, worked = time.perf_counter(), time.process_time()
    kernels = load(folder)
    ended, work = time.perf_counter(), time.process_time() - worked
    kernels.close()
    after = own_bytes(os.getpid())
    return Start(imported - began, ended - loading, work, after - before)


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    print(msgspec.json.encode(start(Path(sys.argv[1]))).decode(), flush=True)
