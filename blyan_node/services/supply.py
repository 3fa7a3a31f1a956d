"""Makes sure that the bytes of blocks are here before they are loaded."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import trio

from protocols.ids import BlockId
from storage.store import Store

Progress = Callable[[int, int | None, str], None]
"""Told of long work: what is done, of how much, and of what."""


def silent(done: int, total: int | None, what: str) -> None:
    """A `Progress` for work that nobody watches."""


class Fetcher(Protocol):
    """Gets chunks from peers; `blyan_node.services.fetch.Fetch` is it."""

    async def fetch(self, blocks: Sequence[BlockId], progress: Progress) -> int:
        """Stores the bodies of `blocks`; the bytes that came. Raises `Refused`: nobody has one."""


class Supply:
    """What is stored, and the network for what is not."""

    def __init__(self, store: Store, fetcher: Fetcher) -> None:
        self._store = store
        self._fetcher = fetcher
        self._limiter = trio.CapacityLimiter(1)

    async def ensure(self, blocks: Iterable[BlockId], progress: Progress = silent) -> int:
        """Fetches what is missing of `blocks`; how many bytes that was. Raises `Refused`."""
        look = partial(self._missing, tuple(blocks))
        missing = await trio.to_thread.run_sync(look, limiter=self._limiter)
        return await self._fetcher.fetch(missing, progress) if missing else 0

    def _missing(self, blocks: tuple[BlockId, ...]) -> list[BlockId]:
        return [block for block in blocks if self._store.missing_chunks(block)]
