"""What a measurement says, and how it is taken.

A measurement is run beside what it is compared with, in turn and in the same process or machine
state, so that whatever else the machine does falls on both. A row has the medians.
"""

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping

import msgspec


class Row(msgspec.Struct, frozen=True):
    """One line of the report.

    `beside` has the peers and limits of the same run in the same unit, None for a peer that is not
    installed; `ratio` is `value` over the first of them that was measured; `runs` is how often each
    was measured; `goal` says what is to be reached, in words.
    """

    name: str
    value: float
    unit: str
    beside: dict[str, float | None]
    ratio: float | None
    goal: str
    runs: int


Measure = Callable[[], float]

# How to get the peers that are installed by those who want them, by the first word of their names.
_GET = {
    "transformers": "pip install 'blyan-node[test]'",
    "llama.cpp": "pip install 'blyan-node[demo]' && npm install --ignore-scripts node-llama-cpp",
}


def alternate(runs: int, **measures: Measure) -> dict[str, float]:
    """Calls each measure `runs` times, in turn, after one round that does not count: medians."""
    for measure in measures.values():
        measure()
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            taken[name].append(measure())
    return {name: statistics.median(values) for name, values in taken.items()}


async def alternate_async(
    runs: int, **measures: Callable[[], Awaitable[float]]
) -> dict[str, float]:
    """The same as `alternate` for measures that await."""
    for measure in measures.values():
        await measure()
    taken: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, measure in measures.items():
            taken[name].append(await measure())
    return {name: statistics.median(values) for name, values in taken.items()}


def seconds(action: Callable[[], object]) -> float:
    """How long one call takes, in s."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def row(
    name: str,
    unit: str,
    value: float,
    *,
    beside: Mapping[str, float | None],
    goal: str,
    runs: int,
) -> Row:
    """A row with its ratio worked out and its numbers cut to four digits."""
    limit = next((other for other in beside.values() if other is not None), None)
    return Row(
        name=name,
        value=_short(value),
        unit=unit,
        beside={key: None if other is None else _short(other) for key, other in beside.items()},
        ratio=None if not limit else _short(value / limit),
        goal=goal,
        runs=runs,
    )


def missing(name: str) -> str:
    """What a report says of a peer that was not measured."""
    how = _GET.get(name.partition(" ")[0])
    return f"not installed ({how})" if how else "not on this machine"


def _short(value: float) -> float:
    return float(f"{value:.4g}")
