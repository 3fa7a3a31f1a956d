"""Checking the whole chain again: every header, its signature, its parents, and the heads."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import trio

from blyan_node.services.chain import Chain
from blyan_node.services.supply import Progress
from protocols.dag.header import Block
from protocols.dag.heads import heads_of
from protocols.dag.validate import validate_header
from protocols.errors import Refused, RemoteProtocolError
from protocols.ids import BlockId

PAGE_BLOCKS = 256


@dataclass
class Audit:
    """How many blocks were looked at, and which do not check, with the reason."""

    blocks: int = 0
    bad: list[tuple[BlockId, str]] = field(default_factory=list)


def audit(chain: Chain, progress: Progress) -> Audit:
    """Checks every accepted block in the order of acceptance; runs on a thread of trio's."""
    found = Audit()
    total = chain.store.stats().accepted
    seen: set[BlockId] = set()
    for number, id in _log(chain):
        found.blocks += 1
        try:
            _check(chain, id, seen)
        except (Refused, RemoteProtocolError) as error:
            found.bad.append((id, error.why))
        seen.add(id)
        if number % PAGE_BLOCKS == 0 or number == total:
            trio.from_thread.check_cancelled()
            trio.from_thread.run_sync(progress, number, total, "headers")
    for model in list(chain.models()):
        whole = heads_of(model, chain.store)
        if dict(chain.heads(model)) != ({} if whole is None else whole.heads):
            found.bad.append((model, "its heads do not follow from its blocks"))
    return found


def _log(chain: Chain) -> Iterator[tuple[int, BlockId]]:
    after = 0
    while page := chain.store.log(after, PAGE_BLOCKS):
        yield from page
        after = page[-1][0]


def _check(chain: Chain, id: BlockId, seen: set[BlockId]) -> None:
    """Raises `Refused` or `RemoteProtocolError` if the block does not check."""
    block = _decoded(chain, id)
    validate_header(block, network=chain.network, now_ms=chain.clock_ms())
    for parent in block.header.depends_on:
        if parent not in seen and not chain.store.is_accepted(parent):
            raise RemoteProtocolError("block", "it depends on a block that is not accepted")


def _decoded(chain: Chain, id: BlockId) -> Block:
    block = chain.store.block(id)
    if block is None:
        raise RemoteProtocolError("block", "it is in the log and not in the store")
    return block
