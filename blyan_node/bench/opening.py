"""`open-100000`: how long a store of 100,000 blocks takes to open."""

import tempfile
from itertools import islice
from pathlib import Path

from blyan_node.bench.chains import Author
from blyan_node.bench.rows import Row, alternate, row, seconds
from protocols.ids import model_root
from storage.leveldb import LevelDBEngine
from storage.store import INDEX_BUFFER_BYTES, INDEX_CACHE_BYTES, open_store

BLOCKS = 100_000
SUBJECTS = 998
BATCH = 1_000
RUNS = 7


def measure() -> list[Row]:
    """Fills a store, then opens and closes it beside opening the bare LevelDB of its index."""
    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        data = Path(scratch) / "data"
        fill(data)

        def whole() -> None:
            with open_store(data) as store:
                assert store.stats().accepted == BLOCKS

        def bare() -> None:
            LevelDBEngine(
                data / "index", buffer_bytes=INDEX_BUFFER_BYTES, cache_bytes=INDEX_CACHE_BYTES
            ).close()

        medians = alternate(RUNS, store=lambda: seconds(whole), leveldb=lambda: seconds(bare))
    beside = {"LevelDB of its index alone": medians["leveldb"]}
    return [row("open-100000", "s", medians["store"], beside=beside, goal="< 1 s", runs=RUNS)]


def fill(data: Path) -> None:
    """One model, its first release and updates of it: `BLOCKS` accepted blocks."""
    author = Author()
    model = author.model()
    parts = author.parts(model.id, SUBJECTS)
    release = author.release(model.id, parts)
    heads = {part.header.subject: part.id for part in parts if part.header.subject}
    first = [model, *parts, release]
    updates = islice(author.updates(parts), BLOCKS - len(first))
    with open_store(data) as store:
        store.accept(
            first,
            author.manifests.items(),
            release_subjects={release.id: dict(heads)},
            heads={model.id: (dict(heads), model_root(model.id, heads))},
        )
        while batch := list(islice(updates, BATCH)):
            heads |= {block.header.subject: block.id for block in batch if block.header.subject}
            store.accept(batch, heads={model.id: (dict(heads), model_root(model.id, heads))})
