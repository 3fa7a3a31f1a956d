"""The two topics of a network: from the wire to the subscriber, and from a service to everybody.

A message that a peer passes on takes one synchronous path: pace, form, seen, signature, the topic's
validator, then the subscriber's queue, then the router. No duplicate can slip in between, and what
must not spread does not. The library's part of it is in `pubsub`.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from libp2p.abc import IHost
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.validators import signature_validator
from libp2p.tools.anyio_service.context import background_trio_service

from blyan_node.network.fanout import Queue
from blyan_node.network.interface import Counters, Topic, Validator
from blyan_node.network.pace import Pace, Recent
from blyan_node.network.pubsub import TOPICS_PER_PEER_MAX, GuardedPubsub, OneTopicRouter
from blyan_node.network.traffic import Ledger
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import NetworkId, PeerId, cid_text
from protocols.limits import gossip_message_bytes_max

_SEQNO_BYTES_MAX = 8
_ID_BYTES_MAX = 64


class Gossip:
    """The two topics of one network."""

    def __init__(
        self,
        host: IHost,
        network: NetworkId,
        counters: Counters,
        blame: Callable[[PeerId, Exception], None],
        allows: Callable[[PeerId], bool],
        ledger: Ledger,
    ) -> None:
        self._counters = counters
        self._names: dict[Topic, str] = {
            "blocks": f"/blyan/{cid_text(network)}/blocks/1",
            "adverts": f"/blyan/{cid_text(network)}/adverts/1",
        }
        self._subscribers: dict[str, list[tuple[Validator, Queue[tuple[PeerId, bytes]]]]] = {
            name: [] for name in self._names.values()
        }
        self._pace = Pace()
        self._recent = Recent()
        self._router = OneTopicRouter(frozenset(self._names.values()))
        self._pubsub = GuardedPubsub(
            host,
            self._router,
            max_subscriptions_per_rpc=TOPICS_PER_PEER_MAX,
            max_subscriptions_per_peer=TOPICS_PER_PEER_MAX,
            allowed_topics=self._router.topics,
        )
        self._pubsub.deliver = self._deliver
        self._pubsub.blame = blame
        self._pubsub.controls = Pace()
        self._pubsub.allows = allows
        self._pubsub.ledger = ledger

    def subscribe(
        self, topic: Topic, validate: Validator, capacity: int
    ) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """See `PeerNetwork.subscribe`."""
        queue = Queue[tuple[PeerId, bytes]](capacity)
        self._subscribers[self._names[topic]].append((validate, queue))
        return queue.receiver

    async def publish(self, topic: Topic, data: bytes) -> None:
        """See `PeerNetwork.publish`."""
        if len(data) > gossip_message_bytes_max:  # pubsub would drop it and say nothing
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes")
        self._recent.is_new(self._names[topic], data, trio.current_time())
        self._counters.gossip_out += 1
        await self._pubsub.publish(self._names[topic], data)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Pubsub and its router run inside this block."""
        async with background_trio_service(self._router), background_trio_service(self._pubsub):
            await self._pubsub.wait_until_ready()
            for name in self._names.values():
                await self._pubsub.subscribe(name)
            yield

    def _deliver(self, peer: PeerId, msg: rpc_pb2.Message) -> bool:
        """Whether `msg` is to be passed on; synchronous, so no duplicate can slip in between."""
        now = trio.current_time()
        if not self._pace.allows(peer, now, len(msg.data)):
            self._counters.gossip_dropped += 1
            return False
        _check_form(msg)
        if self._pubsub.seen(msg):
            return False
        topic = msg.topicIDs[0]
        if topic not in self._subscribers:
            return False
        if not signature_validator(msg):
            self._counters.gossip_refused += 1
            raise RemoteProtocolError("gossip", "the publisher's signature does not hold")
        if not self._recent.is_new(topic, msg.data, now):
            return False
        return self._hand_over(peer, topic, msg.data)

    def _hand_over(self, peer: PeerId, topic: str, data: bytes) -> bool:
        for validate, queue in self._subscribers[topic]:
            try:
                validate(peer, data)
            except RemoteProtocolError:
                self._counters.gossip_refused += 1
                raise
            self._counters.gossip_dropped += queue.put((peer, data))
        self._counters.gossip_in += 1
        return True


def _check_form(msg: rpc_pb2.Message) -> None:
    if len(msg.topicIDs) != 1:
        raise RemoteProtocolError("gossip", f"a message for {len(msg.topicIDs)} topics")
    if len(msg.seqno) > _SEQNO_BYTES_MAX or not 0 < len(msg.from_id) <= _ID_BYTES_MAX:
        raise RemoteProtocolError("gossip", "a message id that is too long")
    if len(msg.data) > gossip_message_bytes_max:
        raise RemoteProtocolError("gossip", f"a message of {len(msg.data)} bytes")
