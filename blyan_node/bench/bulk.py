"""`bulk`: chunks from one process to another, as a fetch asks for them."""

import time
from functools import partial

import trio

from blyan_node.bench.near_side import Carrier, carriers
from blyan_node.bench.rows import Row, alternate_async, row
from protocols.limits import chunk_bytes, chunks_per_request_max

REQUESTS = 32  # of 2 MiB each
IN_FLIGHT = 4
RUNS = 5


def measure() -> list[Row]:
    """MB/s; ours are encrypted and each chunk is checked against its hash, plain TCP is neither."""
    medians = trio.run(_medians)
    beside = {"plain trio TCP": medians["tcp"], "stock libp2p stream": medians["stock"]}
    goal = "ratio >= 0.45 and >= 4x stock (with the dedicated data plane, a later step)"
    return [row("bulk", "MB/s", medians["ours"], beside=beside, goal=goal, runs=RUNS)]


async def _medians() -> dict[str, float]:
    async with carriers() as by_name:
        taken = {name: partial(_rate, carrier) for name, carrier in by_name.items()}
        return await alternate_async(RUNS, **taken)


async def _rate(carrier: Carrier) -> float:
    left = REQUESTS

    async def ask() -> None:
        nonlocal left
        while left:
            left -= 1
            await carrier.chunks()

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(IN_FLIGHT):
            nursery.start_soon(ask)
    return REQUESTS * chunks_per_request_max * chunk_bytes / 1e6 / (time.perf_counter() - started)
