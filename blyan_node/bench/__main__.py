"""`python -m blyan_node bench [NAME…] [--json]`: runs measurements and prints their rows."""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import msgspec

from blyan_node.bench.rows import Row, missing
from protocols.errors import RemoteProtocolError

# Where each measurement is: a module, and its function if that is not `measure`. It gives or yields
# rows.
MEASUREMENTS = {
    "verify-1000": "verifying",
    "open-100000": "opening",
    "publish": "publishing",
    "activation-rtt": "round_trip",
    "bulk": "bulk",
    "gossip-16": "gossiping",
    "idle": "idling",
    "kernels": "kernels",
    "kernels-start": "kernels_start",
    "decode-float32": "decoding:float32",
    "decode-16bit": "decoding:sixteen_bit",
    "decode-8bit": "decoding:eight_bit",
    "decode-parts": "parts",
    "decode-swarm": "swarm",
    "prefill": "prefilling",
    "quality": "quality",
    "widening": "widening",
    "memory": "memory",
    "scale": "scale",
    "recovery": "recovery",
}
# They take minutes, gigabytes or namespaces, or give the same numbers everywhere.
WHEN_NAMED = {"scale", "quality", "recovery"}


class Report(msgspec.Struct, frozen=True):
    """What `--json` prints."""

    rows: list[Row]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the named measurements, by default all but `WHEN_NAMED`; returns the exit code.

    Raises `RemoteProtocolError` for a name that is none.
    """
    parser = argparse.ArgumentParser(prog="blyan-node bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    names = list(dict.fromkeys(name for given in arguments.names for name in meant(given)))
    report = Report([])
    for name in names or [name for name in MEASUREMENTS if name not in WHEN_NAMED]:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        for row in measurement(name)():
            report.rows.append(row)
            if not arguments.json:
                print(line(row), flush=True)
    if arguments.json:
        print(msgspec.json.encode(report).decode())
    return 0


def meant(given: str) -> list[str]:
    """The measurements of that name, or those whose names begin with it: `decode`."""
    if given in MEASUREMENTS:
        return [given]
    found = [name for name in MEASUREMENTS if name.startswith(f"{given}-")]
    if not found:
        known = ", ".join(MEASUREMENTS)
        raise RemoteProtocolError(f"bench {given[:40]}", f"there is none; there are {known}")
    return found


def measurement(name: str) -> Callable[[], Iterable[Row]]:
    """What takes the measurement of that name."""
    module, _, function = MEASUREMENTS[name].partition(":")
    found = getattr(importlib.import_module(f"blyan_node.bench.{module}"), function or "measure")
    return cast(Callable[[], Iterable[Row]], found)


def line(row: Row) -> str:
    """A row for people."""
    beside = ", ".join(
        f"{name} {missing(name) if value is None else value}" for name, value in row.beside.items()
    )
    ratio = "" if row.ratio is None else f"  = {row.ratio} x"
    return f"{row.name:16} {row.value} {row.unit}  beside {beside}{ratio}  (goal: {row.goal})"


if __name__ == "__main__":
    sys.exit(main())
