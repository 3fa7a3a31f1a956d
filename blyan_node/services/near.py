"""One token's way through the experts that this node keeps, without leaving the compute thread.

A token of a model of thirty layers would change threads sixty times; where its experts are here,
it does so once. What is not here is left to `blyan_node.services.layers`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from blyan_node.services.account import Account
from blyan_node.services.compute import Rows, apply_expert
from blyan_node.services.held import Held
from blyan_node.services.holding import Holding
from protocols.ids import BlockId, PeerId
from protocols.precision import Precision

Blocks = Mapping[int, Mapping[int, BlockId]]  # by layer and expert


class Near:
    """Experts that are kept here, by layer and number; they stay for as long as this is used."""

    def __init__(self, held: Mapping[tuple[int, int], Held]) -> None:
        self._held = held
        self._used: list[Held] = []

    def compute(self, layer: int, row: Rows, experts: Sequence[int]) -> Rows | None:
        """The unweighted outputs [1, top_k, hidden] of `row` [1, hidden]; None if one is not here.

        For compute threads.
        """
        held = [self._held.get((layer, expert)) for expert in experts]
        found = [one for one in held if one is not None]
        if len(found) < len(held):
            return None
        out = np.empty((1, len(found), row.shape[1]), np.float32)
        for rank, one in enumerate(found):
            out[0, rank] = apply_expert(one.expert, row)[0]
        self._used += found
        return out

    def tell(self, account: Account, holding: Holding, peer: PeerId) -> None:
        """Says which experts were used: to the request's account, and to whoever lets them go."""
        for one in self._used:
            account.computed(one.what.layer, one.what.expert, one.what.block, peer, 1)
        with holding.use([one.what.block for one in {id(o): o for o in self._used}.values()]):
            self._used.clear()


@contextmanager
def near(holding: Holding, blocks: Blocks, precision: Precision) -> Iterator[Near]:
    """The kept experts among `blocks` in that precision."""
    kept = [
        (layer, expert, block)
        for layer, experts in blocks.items()
        for expert, block in experts.items()
        if precision == holding.precision and holding.keeps(block)
    ]
    with holding.use([block for _, _, block in kept], precision) as held:
        assert held is not None, "they are kept, and nothing has run since"
        yield Near({(n, e): one for (n, e, _), one in zip(kept, held, strict=True)})
