"""One request's passes through a model: trunk and KV cache here, experts wherever they are held."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import trio

from blyan_node.moe.arrays import array_of, tensor_of
from blyan_node.moe.cache import KVCache
from blyan_node.moe.here import Here
from blyan_node.moe.layer import Attended, Passed
from blyan_node.moe.trunk import Trunk
from blyan_node.services.account import Account
from blyan_node.services.compute import LayerRows, Rows, in_turn
from blyan_node.services.layers import Layers
from blyan_node.services.memory import Sort
from blyan_node.services.near import Near
from protocols.ids import BlockId, Subject, parse_subject
from protocols.precision import Precision

T = TypeVar("T")
Choices = npt.NDArray[np.int64]
Watch = Callable[[int, Choices], None]
LAST = slice(-1, None)


@dataclass(frozen=True)
class Met:
    """A layer's attention is done: what its experts are to compute, and what is kept for after."""

    attended: Attended
    rows: Rows  # [n, hidden]
    experts: Choices  # [n, top_k] in the router's order


Found = Met | Any  # or logits, or None


@dataclass
class Session:
    """A model at one root, and one sequence of tokens through it, all in one precision.

    `limiter` is the node's for products. Every value is that of the single-process reference, bit
    for bit: prompts are cut at the trunk's fixed positions, rows do not depend on what else is
    computed, and sums are in the order of the router.
    """

    model: BlockId
    heads: Mapping[Subject, BlockId]
    trunk: Trunk
    layers: Layers
    limiter: trio.CapacityLimiter
    account: Account
    precision: Precision
    profile: str
    watch: Watch | None = None  # told of each layer's experts, piece by piece
    _cache: KVCache = field(init=False)
    _blocks: dict[int, dict[int, BlockId]] = field(init=False)
    _near: Near | None = None

    def __post_init__(self) -> None:
        self._blocks = {}
        for name, block in self.heads.items():
            subject = parse_subject(name)
            if subject.layer is not None and subject.expert is not None:
                self._blocks.setdefault(subject.layer, {})[subject.expert] = block

    @asynccontextmanager
    async def room(self, positions: int) -> AsyncIterator[None]:
        """Memory for a sequence of so many tokens. Raises `Refused` if this node has it not."""
        holding, size = self.layers.holding, self.trunk.cache_bytes(positions)
        await holding.room(size, Sort.PLACED)  # if there is none, `cache` says why
        with holding.memory.cache(size):
            await holding.clear()
            self._cache = self.trunk.new_cache(positions)
            try:
                yield
            finally:
                self._give_back()
                del self._cache

    async def extend(self, ids: Sequence[int], *, every: bool = False) -> Rows:
        """Passes `ids` on; logits [1, vocab] after the last, or [n, vocab] after each of them.

        Within `room`. Raises `Refused` for an expert that is not available.
        """
        return np.concatenate([rows async for rows in self._extend(ids, every, array_of)])

    async def first(self, ids: Sequence[int], pick: Callable[[Any], int]) -> int:
        """Passes a prompt on; the token that `pick` chooses by the logits [vocab] after the last.

        In the compute thread. Otherwise as `extend`.
        """
        (token,) = [token async for token in self._extend(ids, False, lambda rows: pick(rows[-1]))]
        return token

    async def _extend(
        self, ids: Sequence[int], every: bool, take: Callable[[Any], T]
    ) -> AsyncIterator[T]:
        """What `take` makes of the logits of each piece that there are some of."""
        done = self._cache.length
        for start, end in self.trunk.prefill_cuts(done, len(ids)):
            rows = slice(None) if every else LAST if end == done + len(ids) else None
            found = await self._pass(ids[start - done : end - done], rows, take)
            if found is not None:
                yield found

    async def _pass(
        self, ids: Sequence[int], rows: slice | None, take: Callable[[Any], T]
    ) -> T | None:
        """One piece through every layer; what `take` makes of the logits of `rows` of it."""
        self._give_back()
        met = await self._compute(partial(self.enter, ids, None, rows), take)
        while isinstance(met, Met):
            outputs = await self.experts(met)
            met = await self._compute(partial(self.leave, met, outputs, None, rows), take)
        return met

    def nearby(self) -> Near:
        """The experts that are kept here now."""
        if self._near is None or not self._near.current:
            self._give_back()
            holding = self.layers.holding
            given = (holding, self.trunk.config, self._blocks, self.precision, self._used)
            self._near = Near(*given)
        return self._near

    def _give_back(self) -> None:
        if self._near is not None:
            self._near.close()
            self._near = None

    def _used(self, layer: int, expert: int, block: BlockId, rows: int) -> None:
        self.account.computed(layer, expert, block, self.layers.network.peer_id, rows)

    def enter(
        self,
        ids: Sequence[int],
        here: Here | None,
        rows: slice | None,
        ready: Callable[[], None] = lambda: None,
    ) -> Found:
        """In the compute thread: passes the next tokens on, to where experts are elsewhere.

        Behind the last layer it gives the logits of `rows` [n, vocab], or None if of none. `ready`
        is called when all is prepared.
        """
        return _met(self.trunk.enter(ids, self._cache, here, rows, ready))

    def leave(self, met: Met, outputs: Rows, here: Here | None, rows: slice | None) -> Found:
        """The same from behind such a layer, with what its experts computed."""
        return _met(self.trunk.leave(met.attended, tensor_of(outputs), self._cache, here, rows))

    async def experts(self, met: Met) -> Rows:
        """What the experts compute of a layer's rows [n, top_k, hidden], wherever they are."""
        layer = met.attended.layer
        if self.watch is not None:
            self.watch(layer, met.experts)
        batch = LayerRows(
            self.model,
            layer,
            met.rows,
            met.experts.tolist(),
            self._blocks[layer],
            self.precision,
            self.profile,
        )
        return await self.layers.compute(batch, self.account)

    async def _compute(self, work: Callable[[], Found], take: Callable[[Any], T]) -> Met | T | None:
        def compute() -> Met | T | None:
            found = work()
            return found if found is None or isinstance(found, Met) else take(found)

        return await in_turn(compute, self.limiter)


def _met(found: Passed) -> Found:
    if not isinstance(found, Attended):
        return found
    assert found.routed is not None
    return Met(found, array_of(found.routed.normed), array_of(found.routed.experts))
