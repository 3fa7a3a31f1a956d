"""Gossipsub 1.1 for two topics, behind our own validation, rate limits and queues.

py-libp2p 0.8.1's pubsub, as it comes, ends the node when a peer sends garbage or a validator
raises, delivers duplicates from asynchronous validators, drops in silence what a queue of 32 does
not hold, keeps state for any topic that a peer names, and has a heartbeat of 120 s. So messages
take our path from the wire to the subscriber (`GuardedPubsub.push_msg`): limits, seen, signature,
the topic's validator, then the subscriber's queue, then the router.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from libp2p.abc import IHost, INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.validators import signature_validator
from libp2p.tools.anyio_service.context import background_trio_service

from blyan_node.network.fanout import Queue
from blyan_node.network.host import ENDINGS
from blyan_node.network.interface import Counters, Topic, Validator
from protocols.errors import LocalProtocolError, RemoteProtocolError
from protocols.ids import NetworkId, PeerId, cid_text
from protocols.limits import (
    gossip_burst_max,
    gossip_message_bytes_max,
    gossip_per_s_max,
    gossip_queue_max,
    gossip_remembered_max,
    gossip_remembered_s,
    peers_max,
)

log = logging.getLogger("blyan.network")

_HEARTBEAT_S = 1
_SEQNO_BYTES_MAX = 8
_ID_BYTES_MAX = 64
_TOPICS_PER_PEER_MAX = 16
_RPC_BYTES_MAX = 1 << 20  # the same in all implementations
_LENGTH_BYTES_MAX = 4
_READ_BYTES = 1 << 16

Deliver = Callable[[PeerId, rpc_pb2.Message], bool]


class OneTopicRouter(GossipSub):
    """A router that keeps no state for topics that are not ours, and follows no peer exchange."""

    topics: frozenset[str] = frozenset()

    async def handle_ihave(self, ihave_msg: rpc_pb2.ControlIHave, sender_peer_id: ID) -> None:
        """Ignores other topics."""
        if ihave_msg.topicID in self.topics:
            await super().handle_ihave(ihave_msg, sender_peer_id)

    async def handle_graft(self, graft_msg: rpc_pb2.ControlGraft, sender_peer_id: ID) -> None:
        """Ignores other topics."""
        if graft_msg.topicID in self.topics:
            await super().handle_graft(graft_msg, sender_peer_id)

    async def handle_prune(self, prune_msg: rpc_pb2.ControlPrune, sender_peer_id: ID) -> None:
        """Ignores other topics."""
        if prune_msg.topicID in self.topics:
            await super().handle_prune(prune_msg, sender_peer_id)

    async def _do_px(self, px_peers: list[rpc_pb2.PeerInfo]) -> None:
        """Hello has our peer exchange; strangers' lists are not followed."""


class GuardedPubsub(Pubsub):
    """A pubsub in which nothing that a peer sends raises out of a task."""

    deliver: Deliver
    blame: Callable[[PeerId, Exception], None]

    async def stream_handler(self, stream: INetStream) -> None:
        """Reads one peer's messages until its stream ends or makes no sense."""
        peer = stream.muxed_conn.peer_id
        try:
            await self.continuously_read_stream(stream)
        except ENDINGS:
            pass
        except RemoteProtocolError as error:
            self.blame(PeerId(str(peer)), error)
        except Exception as error:  # protobuf's errors, and py-libp2p's, which share no base
            self.blame(PeerId(str(peer)), RemoteProtocolError("gossip", repr(error)[:200]))
        await stream.reset()

    async def continuously_read_stream(self, stream: INetStream) -> None:
        """Reads RPCs; the stock loop reads lengths byte by byte and has a task for each message."""
        peer = stream.muxed_conn.peer_id
        buffer = bytearray()
        while data := await stream.read(_READ_BYTES):
            buffer += data
            while (wire := _next_rpc(buffer)) is not None:
                rpc = rpc_pb2.RPC()
                rpc.ParseFromString(wire)
                await self._take(peer, rpc)

    async def _take(self, peer: ID, rpc: rpc_pb2.RPC) -> None:
        for msg in rpc.publish:
            if self._is_subscribed_to_msg(msg):
                await self.push_msg(peer, msg)
        if len(rpc.subscriptions) > _TOPICS_PER_PEER_MAX:
            raise RemoteProtocolError("gossip", f"{len(rpc.subscriptions)} subscriptions at once")
        for subscription in rpc.subscriptions:
            self.handle_subscription(peer, subscription)
        if rpc.HasField("control"):
            await self.router.handle_rpc(rpc, peer)

    async def push_msg(self, msg_forwarder: ID, msg: rpc_pb2.Message) -> None:
        """Judges a message that a peer passed on, or publishes one of ours."""
        try:
            if msg_forwarder == self.my_id or self.deliver(PeerId(str(msg_forwarder)), msg):
                self._mark_msg_seen(msg)
                await self.router.publish(msg_forwarder, msg)
        except RemoteProtocolError as error:
            self.blame(PeerId(str(msg_forwarder)), error)
        except Exception as error:  # ids that are none; py-libp2p's errors share no base
            self.blame(PeerId(str(msg_forwarder)), RemoteProtocolError("gossip", repr(error)[:200]))

    async def write_msg(self, stream: INetStream, rpc_msg: rpc_pb2.RPC) -> bool:
        """Sends without our signed address record, which costs each receiver a verification."""
        rpc_msg.ClearField("senderRecord")
        return bool(await super().write_msg(stream, rpc_msg))

    def seen(self, msg: rpc_pb2.Message) -> bool:
        """Whether this very message was here before."""
        return bool(self._is_msg_seen(msg))

    async def _handle_new_peer(self, peer_id: ID) -> None:
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:  # an empty queue is false
            queue._queue.max_size = gossip_queue_max


def _next_rpc(buffer: bytearray) -> bytes | None:
    """Cuts one length-prefixed RPC off the front of `buffer`, if all of it is there."""
    length = 0
    for at, byte in enumerate(buffer[:_LENGTH_BYTES_MAX]):
        length |= (byte & 0x7F) << (7 * at)
        if byte < 0x80:
            break
    else:
        if len(buffer) >= _LENGTH_BYTES_MAX:
            raise RemoteProtocolError("gossip", "a length that does not end")
        return None
    if length > _RPC_BYTES_MAX:
        raise RemoteProtocolError("gossip", f"an RPC of {length} bytes")
    start, end = at + 1, at + 1 + length
    if len(buffer) < end:
        return None
    wire = bytes(buffer[start:end])
    del buffer[:end]
    return wire


@dataclass
class _Bucket:
    tokens: float
    at: float


class Pace:
    """A token bucket for each peer, `gossip_per_s_max` with bursts of `gossip_burst_max`."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[PeerId, _Bucket] = OrderedDict()

    def allows(self, peer: PeerId, now: float) -> bool:
        """Takes a token if there is one."""
        bucket = self._buckets.setdefault(peer, _Bucket(gossip_burst_max, now))
        grown = bucket.tokens + (now - bucket.at) * gossip_per_s_max
        bucket.tokens, bucket.at = min(grown, gossip_burst_max), now
        self._buckets.move_to_end(peer)
        while len(self._buckets) > 4 * peers_max:
            self._buckets.popitem(last=False)
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True


class Recent:
    """Remembers hashes for a while, so that the same data published by two peers comes once."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def is_new(self, topic: str, data: bytes, now: float) -> bool:
        """Whether `data` was not here lately; from now on it was."""
        key = hashlib.sha256(topic.encode() + b"\0" + data).digest()
        while self._seen:
            oldest, then = next(iter(self._seen.items()))
            if now - then < gossip_remembered_s and len(self._seen) < gossip_remembered_max:
                break
            del self._seen[oldest]
        if key in self._seen:
            return False
        self._seen[key] = now
        return True


class Gossip:
    """The two topics of one network."""

    def __init__(
        self,
        host: IHost,
        network: NetworkId,
        counters: Counters,
        blame: Callable[[PeerId, Exception], None],
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
        self._router = OneTopicRouter(
            [TProtocol(PROTOCOL_ID_V11)],
            degree=6,
            degree_low=4,
            degree_high=8,
            heartbeat_initial_delay=0.1,
            heartbeat_interval=_HEARTBEAT_S,
            spam_protection_enabled=False,  # it drops above 10 a second; `Pace` and scores instead
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,
        )
        self._router.topics = frozenset(self._names.values())
        self._router.scorer = None  # `peers.Scores` judges
        self._pubsub = GuardedPubsub(
            host,
            self._router,
            max_subscriptions_per_rpc=_TOPICS_PER_PEER_MAX,
            max_subscriptions_per_peer=_TOPICS_PER_PEER_MAX,
            allowed_topics=self._router.topics,
        )
        self._pubsub.deliver = self._deliver
        self._pubsub.blame = blame

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
        if not self._pace.allows(peer, now):
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
