"""`python -m blyan_node bench [NAME…] [--json]`: runs measurements and prints their rows."""

import argparse
import importlib
import sys
from collections.abc import Sequence

import msgspec

from blyan_node.bench.rows import Row
from protocols.errors import RemoteProtocolError

# The module of each measurement; it has `measure()`, which gives or yields rows.
MEASUREMENTS = {
    "verify-1000": "verifying",
    "open-100000": "opening",
    "publish": "publishing",
    "activation-rtt": "round_trip",
    "bulk": "bulk",
    "gossip-16": "gossiping",
    "idle": "idling",
    "kernels": "kernels",
    "decode-float32": "decoding",
    "decode-swarm": "swarm",
    "widening": "widening",
    "memory": "memory",
    "scale": "scale",
    "recovery": "recovery",
}
WHEN_NAMED = {"scale", "recovery"}  # take minutes, and gigabytes or namespaces


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    rows: list[Row]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named measurements, by default all but the largest; returns the exit code.

    Raises `RemoteProtocolError` for a name that is none.
    """
    parser = argparse.ArgumentParser(prog="blyan-node bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in MEASUREMENTS:
            known = ", ".join(MEASUREMENTS)
            raise RemoteProtocolError(f"bench {name[:40]}", f"there is none; there are {known}")
    report = Report([])
    for name in arguments.names or [name for name in MEASUREMENTS if name not in WHEN_NAMED]:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        module = importlib.import_module(f"blyan_node.bench.{MEASUREMENTS[name]}")
        for row in module.measure():
            report.rows.append(row)
            if not arguments.json:
                print(line(row), flush=True)
    if arguments.json:
        print(msgspec.json.encode(report).decode())
    return 0


def line(row: Row) -> str:
    """A row for people."""
    beside = ", ".join(
        f"{name} {'not installed' if value is None else value}"
        for name, value in row.beside.items()
    )
    ratio = "" if row.ratio is None else f"  = {row.ratio} x"
    return f"{row.name:16} {row.value} {row.unit}  beside {beside}{ratio}  (goal: {row.goal})"


if __name__ == "__main__":
    sys.exit(main())
