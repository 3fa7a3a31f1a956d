"""One token's way through the experts that this node keeps, without leaving the compute thread.

A token of a model of thirty layers would change threads sixty times; where its experts are here,
it does so once. What is not here is left to `blyan_node.services.layers`.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.here import Here
from blyan_node.services.holding import Holding
from protocols.ids import BlockId
from protocols.precision import Precision

Blocks = Mapping[int, Mapping[int, BlockId]]  # by layer and expert


class Near:
    """The experts of a session that are kept here, from token to token.

    They are in use while something is computed with them, and given back between two tokens if
    something else needs their memory or drops one.
    """

    def __init__(
        self,
        holding: Holding,
        config: ModelConfig,
        blocks: Blocks,
        precision: Precision,
        used: Callable[[int, int, BlockId, int], None],
    ) -> None:
        """Those of `blocks` in that precision.

        In the end `used` is told of each that was: its layer, number and block, and of how many
        rows.
        """
        self._holding, self._blocks, self._version = holding, blocks, holding.version
        self._used = used
        kept = [
            (layer, expert, block)
            for layer, experts in blocks.items()
            for expert, block in experts.items()
            if precision == holding.precision and holding.keeps(block)
        ]
        self._open = ExitStack()
        held = self._open.enter_context(holding.use([block for *_, block in kept], precision))
        assert held is not None, "they are kept, and nothing has run since"
        pairs = zip(kept, held, strict=True)
        self._here = Here(config, {(n, e): one.expert for (n, e, _), one in pairs})
        self._busy = self._closed = False
        self.asked = False  # for what they take: whoever computes with them is to come to an end
        holding.borrowers.add(self)

    @property
    def current(self) -> bool:
        """Whether these are all that are kept here now."""
        return not self._closed and self._version == self._holding.version

    def begin(self) -> Here:
        """What the trunk computes with; they are in use until `end`."""
        self._busy = True
        return self._here

    def end(self) -> None:
        """They may be given back again."""
        self._busy = False
        if self.asked:
            self.close()

    def give_back(self) -> None:
        """Ends the use of all of them, after the token that is being computed."""
        self.asked = True
        if not self._busy:
            self.close()

    def close(self) -> None:
        """Ends their use, and says which were used: also to whoever lets the others go first."""
        if self._closed:
            return
        self._closed = True
        self._holding.borrowers.discard(self)
        self._open.close()
        used = []
        for layer, expert, rows in self._here.used():
            block = self._blocks[layer][expert]
            self._used(layer, expert, block, rows)
            used.append(block)
        self._here.let_go()  # a session may hold this for as long as it waits for its client
        with self._holding.use([block for block in used if self._holding.keeps(block)]):
            pass
