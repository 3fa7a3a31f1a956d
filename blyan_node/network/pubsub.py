"""py-libp2p's pubsub and gossipsub router, with what a peer can do to them taken out.

As they come in 0.8.1, they end the node when a peer sends garbage or a validator raises, deliver
duplicates from asynchronous validators, drop in silence what a queue of 32 does not hold, keep
state for any topic that a peer names, copy a message as often as a peer asks for it, and have a
heartbeat of 120 s. So RPCs take our path off the wire, with limits first; what they publish goes to
`deliver`, which is synchronous and judges.
"""

from collections.abc import Callable

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.utils import safe_bytes_from_hex

from blyan_node.network.host import ENDINGS
from blyan_node.network.pace import Pace
from blyan_node.network.traffic import Ledger
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import (
    gossip_answer_bytes_max,
    gossip_controls_max,
    gossip_ids_max,
    gossip_queue_max,
)

_HEARTBEAT_S = 1
TOPICS_PER_PEER_MAX = 16
_RPC_BYTES_MAX = 1 << 20  # the same in all implementations
_LENGTH_BYTES_MAX = 4
_READ_BYTES = 1 << 16

Deliver = Callable[[PeerId, rpc_pb2.Message], bool]


class OneTopicRouter(GossipSub):
    """A router that keeps no state for topics that are not ours, and follows no peer exchange."""

    def __init__(self, topics: frozenset[str]) -> None:
        super().__init__(
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
        self.scorer = None  # `peers.Scores` judges
        self.topics = topics

    async def handle_ihave(self, ihave_msg: rpc_pb2.ControlIHave, sender_peer_id: ID) -> None:
        """Ignores other topics, and asks for no more than `gossip_ids_max` messages."""
        if ihave_msg.topicID in self.topics:
            ids = list(dict.fromkeys(ihave_msg.messageIDs))[:gossip_ids_max]
            fewer = rpc_pb2.ControlIHave(topicID=ihave_msg.topicID, messageIDs=ids)
            await super().handle_ihave(fewer, sender_peer_id)

    async def handle_iwant(self, iwant_msg: rpc_pb2.ControlIWant, sender_peer_id: ID) -> None:
        """Sends each message once, however often it is named, `gossip_answer_bytes_max` in all."""
        wanted, size = [], 0
        for text in list(dict.fromkeys(iwant_msg.messageIDs))[:gossip_ids_max]:
            known = safe_bytes_from_hex(text)
            message = None if known is None else self.mcache.get(known)
            if message is not None:
                size += message.ByteSize()
                wanted.append(text)
            if size > gossip_answer_bytes_max:
                break
        if wanted:
            await super().handle_iwant(rpc_pb2.ControlIWant(messageIDs=wanted), sender_peer_id)

    async def handle_idontwant(
        self, idontwant_msg: rpc_pb2.ControlIDontWant, sender_peer_id: ID
    ) -> None:
        """Is of a later version than the one we offer."""

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
    controls: Pace
    ledger: Ledger
    allows: Callable[[PeerId], bool]

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
            for traffic in self.ledger.meters(PeerId(str(peer)), PROTOCOL_ID_V11):
                traffic.bytes_in += len(data)
            while (wire := _next_rpc(buffer)) is not None:
                rpc = rpc_pb2.RPC()
                rpc.ParseFromString(wire)
                await self._take(peer, rpc)

    async def _take(self, peer: ID, rpc: rpc_pb2.RPC) -> None:
        _check_form(rpc)
        for msg in rpc.publish:
            if self._is_subscribed_to_msg(msg):
                await self.push_msg(peer, msg)
        for subscription in rpc.subscriptions:
            self.handle_subscription(peer, subscription)
        if rpc.HasField("control") and self.controls.allows(
            PeerId(str(peer)), trio.current_time(), rpc.control.ByteSize()
        ):
            rpc.ClearField("senderRecord")  # identify brings it, and checks it once
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
        peer = PeerId(str(stream.muxed_conn.peer_id))
        sent = bool(await super().write_msg(stream, rpc_msg))
        for traffic in self.ledger.meters(peer, PROTOCOL_ID_V11) if sent else ():
            traffic.bytes_out += rpc_msg.ByteSize()
        return sent

    def seen(self, msg: rpc_pb2.Message) -> bool:
        """Whether this very message was here before."""
        return bool(self._is_msg_seen(msg))

    async def _handle_new_peer(self, peer_id: ID) -> None:
        if not self.allows(PeerId(str(peer_id))):
            return
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:  # an empty queue is false
            queue._queue.max_size = gossip_queue_max


def _check_form(rpc: rpc_pb2.RPC) -> None:
    if len(rpc.subscriptions) > TOPICS_PER_PEER_MAX:
        raise RemoteProtocolError("gossip", f"{len(rpc.subscriptions)} subscriptions at once")
    control = rpc.control
    for controls in (control.ihave, control.iwant, control.graft, control.prune):
        if len(controls) > gossip_controls_max:
            raise RemoteProtocolError("gossip", f"{len(controls)} control messages at once")


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
