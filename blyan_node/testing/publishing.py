"""Publishing on a store alone, and everything that a store has, for comparing before and after."""

from collections.abc import Sequence
from typing import Any

import trio

from blyan_node.services.authoring import Author
from blyan_node.services.publish import Publish
from blyan_node.testing.blocks import NOW_MS, identity
from protocols.dag.admission import Accepted, admit
from protocols.dag.genesis import DEVELOPMENT
from protocols.dag.header import Block
from protocols.dag.validate import validate_header
from storage.blocks import ManifestRow
from storage.store import PACKS_FOLDER, Store


class LoneChain:
    """The chain service of a node without a network."""

    def __init__(self, store: Store) -> None:
        self.store = store

    async def submit(
        self, blocks: Sequence[Block], manifests: Sequence[ManifestRow], source: None
    ) -> None:
        """Takes blocks of our own in; every one of them must be acceptable."""
        self.store.stage([], manifests)
        for block in blocks:
            validate_header(block, network=DEVELOPMENT.id, now_ms=NOW_MS)
            verdict = admit(block, self.store)
            assert isinstance(verdict, Accepted), verdict
            heads = {verdict.model: (verdict.heads, verdict.root)}
            self.store.accept(verdict.blocks, heads=heads)


def author(store: Store, name: str = "alice") -> Author:
    """An author in the development network, whose clock stands still."""
    return Author(store, identity(name), DEVELOPMENT.id, lambda: NOW_MS)


def publishing(store: Store) -> Publish:
    """Alice's publishing service."""
    return Publish(store, LoneChain(store), author(store), trio.CapacityLimiter(1))


def rows(store: Store) -> tuple[Any, ...]:
    """Every row of both databases, every pack file, and the counts."""
    packs = sorted((store._directory / PACKS_FOLDER).iterdir())
    return (
        list(store.index.engine.iterate(b"")),
        list(store.chunks.data.iterate(b"")),
        [(pack.name, pack.read_bytes()) for pack in packs],
        store.stats(),
    )
