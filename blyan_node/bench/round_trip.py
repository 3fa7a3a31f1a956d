"""`activation-rtt`: one message of 16 KiB there and back between two processes."""

import os
import statistics
import time
from functools import partial

import trio

from blyan_node.bench.near_side import Carrier, carriers
from blyan_node.bench.rows import Row, alternate_async, row

MESSAGE_BYTES = 16 * 1024
ROUND_TRIPS = 200
RUNS = 7


def measure() -> list[Row]:
    """The median of many round trips, on each carrier in turn."""
    medians = trio.run(_medians)
    beside = {"plain trio TCP": medians["tcp"], "stock libp2p stream": medians["stock"]}
    goal = "ratio <= 2 and >= 5x faster than stock (with the dedicated data plane, a later step)"
    return [row("activation-rtt", "ms", medians["ours"], beside=beside, goal=goal, runs=RUNS)]


async def _medians() -> dict[str, float]:
    message = os.urandom(MESSAGE_BYTES)

    async def median_ms(carrier: Carrier) -> float:
        times: list[float] = []
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            await carrier.echo(message)
            times.append(time.perf_counter() - started)
        return 1e3 * statistics.median(times)

    async with carriers() as by_name:
        taken = {name: partial(median_ms, carrier) for name, carrier in by_name.items()}
        return await alternate_async(RUNS, **taken)
