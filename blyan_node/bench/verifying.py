"""`verify-1000`: 1,000 headers decoded, checked and stored, beside their signatures alone."""

import tempfile
from functools import partial
from pathlib import Path

import trio

from blyan_node.bench.chains import NOW_MS, Author
from blyan_node.bench.rows import Row, alternate, row, seconds
from blyan_node.services.chain import Chain
from protocols.dag.genesis import DEVELOPMENT
from protocols.dag.header import Block
from protocols.ids import BlockId, PeerId
from protocols.limits import sync_headers_max
from protocols.signing import BLOCK_TAG, verify
from protocols.sync.messages import Blocks, take_blocks
from storage.store import open_store

HEADERS = 1_000
RUNS = 9
PEER = PeerId("a peer")


def measure() -> list[Row]:
    """Everything that a header goes through in catching up, into a new store each time."""
    author = Author()
    model = author.model()
    blocks = [model, *author.parts(model.id, HEADERS - 1)]
    encoded = [block.encode() for block in blocks]
    ids = [block.id for block in blocks]
    manifests = list(author.manifests.items())

    def caught_up() -> float:
        with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
            with open_store(Path(scratch)) as store:

                async def take() -> None:
                    chain = Chain(store, DEVELOPMENT.id, lambda: NOW_MS)
                    for start in range(0, HEADERS, sync_headers_max):
                        page = slice(start, start + sync_headers_max)
                        checked = partial(_checked, encoded[page], ids[page])
                        arrived = await trio.to_thread.run_sync(checked)
                        await chain.submit(arrived, manifests, PEER)

                taken = seconds(lambda: trio.run(take))
                assert store.stats().staged == HEADERS
            return taken

    def signatures() -> None:
        for block in blocks:
            assert verify(block.header.author, BLOCK_TAG, block.id, block.sig)

    medians = alternate(RUNS, ours=caught_up, bare=lambda: seconds(signatures))
    beside = {"bare Ed25519 verifications": medians["bare"]}
    goal = "ratio <= 1.5 and < 0.5 s"
    return [row("verify-1000", "s", medians["ours"], beside=beside, goal=goal, runs=RUNS)]


def _checked(data: list[bytes], asked: list[BlockId]) -> list[Block]:
    found, _ = take_blocks(Blocks(data, []), asked, network=DEVELOPMENT.id, now_ms=NOW_MS)
    return list(found.values())
