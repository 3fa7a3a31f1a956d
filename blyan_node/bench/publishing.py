"""`publish`: a model directory into the store, beside a plain copy of it with fsync."""

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import trio

from blyan_node.bench.models import write_model
from blyan_node.bench.rows import Row, alternate, row, seconds
from blyan_node.services.authoring import Author
from blyan_node.services.chain import Chain
from blyan_node.services.publish import Publish
from protocols.dag.genesis import DEVELOPMENT
from protocols.ids import DIGEST_BYTES
from protocols.limits import chunk_bytes
from protocols.signing import Identity
from protocols.tensors.manifest import Dtype
from storage import keys
from storage.leveldb import LevelDBEngine
from storage.store import CHUNK_BUFFER_BYTES, CHUNK_CACHE_BYTES, open_store

RUNS = 7
LAYERS = 12  # about 330 MB in bfloat16
COPY_PIECE_BYTES = 1 << 20


def measure() -> list[Row]:
    """MB/s of each, into an empty place every time."""
    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        model = write_model(Path(scratch) / "model", Dtype.BF16, num_hidden_layers=LAYERS)
        megabytes = sum(file.stat().st_size for file in model.iterdir()) / 1e6
        empty = (Path(scratch) / f"out{number}" for number in itertools.count())

        def published() -> float:
            return _rate(megabytes, partial(publish, model), next(empty))

        def copied() -> float:
            return _rate(megabytes, partial(copy, model), next(empty))

        def filled() -> float:
            return _rate(megabytes, partial(fill_leveldb, model), next(empty))

        medians = alternate(RUNS, publish=published, copy=copied, leveldb=filled)
    beside = {
        "plain copy with fsync": medians["copy"],
        "LevelDB given the same pieces": medians["leveldb"],
    }
    goal = "ratio >= 0.8 (missed on a fast disk: docs/decisions/0007-publishing-through-leveldb.md)"
    return [row("publish", "MB/s", medians["publish"], beside=beside, goal=goal, runs=RUNS)]


def _rate(megabytes: float, into: Callable[[Path], None], out: Path) -> float:
    taken = seconds(partial(into, out))
    shutil.rmtree(out)
    return megabytes / taken


def publish(model: Path, out: Path) -> None:
    """Publishes into a new store, as the daemon does."""
    identity = Identity.from_seed(b"bench".ljust(32))

    def now_ms() -> int:
        return time.time_ns() // 1_000_000

    async def run() -> None:
        chain = Chain(store, DEVELOPMENT.id, now_ms)
        author = Author(store, identity, DEVELOPMENT.id, now_ms)
        await Publish(store, chain, author, trio.CapacityLimiter(1)).publish(model, "bench")

    with open_store(out) as store:
        trio.run(run)


def fill_leveldb(model: Path, out: Path) -> None:
    """The limit of any store in LevelDB: the same pieces, not hashed and not indexed."""
    engine = LevelDBEngine(out, buffer_bytes=CHUNK_BUFFER_BYTES, cache_bytes=CHUNK_CACHE_BYTES)
    sequence = itertools.count()
    for file in model.iterdir():
        with file.open("rb") as source:
            while piece := source.read(chunk_bytes):
                engine.batch([(keys.DATA.key(next(sequence), bytes(DIGEST_BYTES)), piece)])
    engine.batch([], sync=True)
    engine.close()


def copy(model: Path, out: Path) -> None:
    """Copies every file and forces it to disk before the next."""
    out.mkdir()
    for file in model.iterdir():
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, COPY_PIECE_BYTES)
            os.fsync(target.fileno())
