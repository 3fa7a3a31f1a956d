"""`verify-1000`: 1,000 headers decoded, checked and stored, beside their signatures alone."""

import tempfile
from pathlib import Path

import trio

from blyan_node.bench.chains import NOW_MS, Author
from blyan_node.bench.rows import Row, alternate, row, seconds
from blyan_node.services.chain import Chain
from protocols.dag.genesis import DEVELOPMENT
from protocols.dag.header import Block
from protocols.dag.validate import decode_block
from protocols.ids import PeerId
from protocols.limits import sync_headers_max
from protocols.signing import BLOCK_TAG, verify
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
    manifests = list(author.manifests.items())

    def caught_up() -> float:
        with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
            with open_store(Path(scratch)) as store:

                async def take() -> None:
                    chain = Chain(store, DEVELOPMENT.id, lambda: NOW_MS)
                    for start in range(0, HEADERS, sync_headers_max):
                        page = [_decode(data) for data in encoded[start : start + sync_headers_max]]
                        await chain.submit(page, manifests, PEER)

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


def _decode(data: bytes) -> Block:
    return decode_block(data, network=DEVELOPMENT.id, now_ms=NOW_MS)
