"""Gossip of blocks: tells everybody of our new releases and updates, and takes in those of others.

Only what takes effect by itself is gossiped: the header of a release or of a single update. What is
heard is a hint. Its header was checked before it spread; what it needs is pulled by `Sync`, and
what is lost or dropped here comes with the next walk through a peer's log.
"""

import logging

import trio

from blyan_node.network.interface import PeerNetwork
from blyan_node.services.chain import Chain, ChainEvent, ReleaseAccepted
from blyan_node.services.sync import Sync
from protocols import limits
from protocols.dag.admission import waits_for_release
from protocols.dag.header import Block
from protocols.dag.validate import Stage, decode_block, refuse
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, cid_text

log = logging.getLogger(__name__)


class Gossip:
    """The topic `blocks`."""

    def __init__(self, network: PeerNetwork, chain: Chain, sync: Sync) -> None:
        self._network = network
        self._chain = chain
        self._sync = sync
        self._heard = network.subscribe("blocks", self._validate, limits.blocks_heard_max)
        self._events = chain.events()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Speaks and listens until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._speak)
            task_status.started()
            async for peer, data in self._heard:
                try:
                    block = self._decode(data)
                except RemoteProtocolError as error:
                    # It was good when it came: the clock was set back since, so that it lies in
                    # the future now. It comes again with the next walk.
                    log.info("a block of %s is dropped: %s", peer, error)
                    continue
                nursery.start_soon(self._sync.pull, block, peer)

    async def _speak(self) -> None:
        async for event in self._events:
            if event.ours:
                block = _told(event)
                await self._network.publish("blocks", block.encode())
                log.info("told of %s", cid_text(block.id))

    def _validate(self, peer: PeerId, data: bytes) -> None:
        if waits_for_release(self._decode(data)):
            refuse(Stage.KIND, "such a block is not gossiped, it comes with its release")

    def _decode(self, data: bytes) -> Block:
        return decode_block(data, network=self._chain.network, now_ms=self._chain.clock_ms())


def _told(event: ChainEvent) -> Block:
    return event.release if isinstance(event, ReleaseAccepted) else event.update
