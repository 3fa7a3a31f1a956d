"""What a model block says: configuration, tokenizer and the other files that travel in its body."""

from collections.abc import Mapping
from dataclasses import dataclass

import trio

from blyan_node.moe.config import ModelConfig
from blyan_node.moe.families import parse_config
from blyan_node.moe.generation_config import stop_ids
from blyan_node.services.supply import Progress, Supply, silent
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, cid_text
from storage.store import Store

descriptions_max = 16


@dataclass(frozen=True)
class Description:
    """A model without its weights."""

    model: BlockId
    name: str
    config: ModelConfig
    files: Mapping[str, bytes]
    stop_ids: frozenset[int]


class Models:
    """Descriptions of the models that were asked for, newest last; a few are kept."""

    def __init__(self, store: Store, supply: Supply) -> None:
        self._store = store
        self._supply = supply
        self._known: dict[BlockId, Description] = {}
        self._limiter = trio.CapacityLimiter(1)

    async def fetch(self, model: BlockId, progress: Progress = silent) -> int:
        """Gets the files of `model` if they are not here; the bytes that came."""
        return 0 if model in self._known else await self._supply.ensure([model], progress)

    async def describe(self, model: BlockId, progress: Progress = silent) -> Description:
        """The description of `model`, whose block is known here; fetches its body if need be.

        Raises `Refused`: no peer has it, or it cannot be read.
        """
        known = self._known.pop(model, None)
        if known is None:
            await self._supply.ensure([model], progress)
            known = await trio.to_thread.run_sync(self._read, model, limiter=self._limiter)
        self._known[model] = known
        while len(self._known) > descriptions_max:
            del self._known[next(iter(self._known))]
        return known

    def _read(self, model: BlockId) -> Description:
        files = {entry.name: b"".join(pieces) for entry, pieces in self._store.read_body(model)}
        block, _ = self._store.body(model)
        if "config.json" not in files:
            raise Refused(
                ErrorCode.BAD_MODEL,
                "this model cannot be read",
                "its block has no config.json",
                "Ask its author to publish it again.",
                {"model": cid_text(model)},
            )
        config = parse_config(files["config.json"])
        name = str(block.header.meta["name"])
        return Description(model, name, config, files, stop_ids(files))
