"""A network of nodes inside one process, with seeded delay, loss and partition.

`Fabric` is the medium, `TwinNetwork` one node's side of it with the interface of
`blyan_node.network.interface.PeerNetwork`. Every message passes through its codec, so that what
works here is encodable there. The same seed gives the same delays and losses, and under trio's
autojumping clock no test waits for them.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import trio

from blyan_node.network.errors import PeerGone
from blyan_node.network.fanout import Fanout, Queue
from blyan_node.network.interface import (
    Counters,
    Handler,
    NetworkConfig,
    Peer,
    PeerDown,
    PeerEvent,
    PeerUp,
    Topic,
    Validator,
)
from blyan_node.testing.calls import Calls
from protocols.errors import LocalProtocolError, NotYet, RemoteProtocolError
from protocols.hello import HelloSummary
from protocols.ids import NetworkId, PeerId, cid
from protocols.limits import (
    gossip_message_bytes_max,
    peer_events_max,
    request_s_max,
)
from protocols.signing import Identity
from protocols.wire import Messages

NETWORK = NetworkId(cid(b"a network for tests"))
BAN_SCORE = -100.0
PENALTY = -20.0


@dataclass
class Weather:
    """How the medium behaves: seconds one way, and the share of messages that never arrive."""

    delay_s: tuple[float, float] = (0.0, 0.0)
    loss: float = 0.0


class Fabric:
    """The medium between the nodes of one test."""

    def __init__(self, seed: int = 0, weather: Weather | None = None) -> None:
        self.random = random.Random(seed)
        self.weather = weather or Weather()
        self.nodes: dict[PeerId, TwinNetwork] = {}
        self.provided: dict[bytes, dict[PeerId, None]] = {}
        self._sides: dict[PeerId, int] = {}

    def node(
        self, identity: Identity, *, role: str = "main", profile: str = "test"
    ) -> "TwinNetwork":
        """A node that joins everybody else once its `run` is started."""
        config = NetworkConfig(NETWORK, "test", role=role, version="0", profile=profile)
        return TwinNetwork(self, identity, config)

    def partition(self, *sides: Iterable["TwinNetwork"]) -> None:
        """Cuts every connection between different sides; a node on no side keeps side 0."""
        numbered = {node.peer_id: i for i, side in enumerate(sides) for node in side}
        self._sides = numbered
        self._settle()

    def heal(self) -> None:
        """Lets everybody reach everybody again."""
        self._sides = {}
        self._settle()

    def reachable(self, a: PeerId, b: PeerId) -> bool:
        """Whether both run and no partition or ban lies between them."""
        return (
            a in self.nodes
            and b in self.nodes
            and self._sides.get(a, 0) == self._sides.get(b, 0)
            and not self.nodes[a].bans(b)
            and not self.nodes[b].bans(a)
        )

    def calls_of(self, peer: PeerId) -> Calls | None:
        """A node's side of its calls; None if it does not run."""
        node = self.nodes.get(peer)
        return node.calls if node else None

    async def pass_time(self) -> None:
        """One message's way; always a checkpoint."""
        await trio.sleep(self.random.uniform(*self.weather.delay_s))

    def lost(self) -> bool:
        """Whether this message is one that never arrives."""
        return self.random.random() < self.weather.loss

    def join(self, node: "TwinNetwork") -> None:
        """A node starts to run."""
        self.nodes[node.peer_id] = node
        self._settle()

    def leave(self, node: "TwinNetwork") -> None:
        """A node stopped or was killed: every other one notices at once."""
        self.nodes.pop(node.peer_id, None)
        for holders in self.provided.values():
            holders.pop(node.peer_id, None)
        self._settle()
        node.disconnect_all()

    def _settle(self) -> None:
        for a in list(self.nodes.values()):
            for b in list(self.nodes.values()):
                if a is not b:
                    a.set_connected(b, self.reachable(a.peer_id, b.peer_id))
            for peer in [p for p in a.peers if p not in self.nodes]:
                a.drop(peer)

    def settle(self) -> None:
        """Makes connections follow from what is reachable; for the nodes themselves."""
        self._settle()


class TwinNetwork:
    """One node of a `Fabric`. See `PeerNetwork` for what each method promises."""

    def __init__(self, fabric: Fabric, identity: Identity, config: NetworkConfig) -> None:
        self._fabric = fabric
        self._config = config
        self.identity = identity
        self.peer_id = identity.peer_id
        self.addrs = [f"/memory/{identity.peer_id}/p2p/{identity.peer_id}"]
        self.peers: dict[PeerId, Peer] = {}
        self.counters = Counters()
        self.summary = HelloSummary()
        self.calls = Calls(self.peer_id, fabric, self.counters, self.penalise)
        self._topics: dict[str, list[tuple[Validator, Queue[tuple[PeerId, bytes]]]]] = {}
        self._seen: set[tuple[str, bytes]] = set()
        self._events = Fanout[PeerEvent]()
        self._scores: dict[PeerId, float] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Is part of the fabric until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = self.calls.nursery = nursery
            self._fabric.join(self)
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._fabric.leave(self)
                self._nursery = self.calls.nursery = None

    def kill(self) -> None:
        """Ends `run` from outside, as SIGKILL would."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def handle(self, protocol: str, messages: Messages, handler: Handler) -> None:
        """Registers who answers on `protocol`."""
        self.calls.handle(protocol, messages, handler)

    async def request(
        self, peer: PeerId, protocol: str, message: object, *, timeout_s: float = request_s_max
    ) -> Any:
        """Asks another node of the fabric."""
        if peer not in self.peers:
            raise PeerGone(peer, "not connected")
        return await self.calls.request(peer, protocol, message, timeout_s)

    @property
    def nursery(self) -> trio.Nursery:
        """Where this node's tasks run."""
        assert self._nursery is not None
        return self._nursery

    async def publish(self, topic: Topic, data: bytes) -> None:
        """Floods `data`: each node validates it once and passes it on to its own peers."""
        if len(data) > gossip_message_bytes_max:
            raise LocalProtocolError(f"a gossip message of {len(data)} bytes")
        await trio.lowlevel.checkpoint()
        self._seen.add((topic, data))
        self.counters.gossip_out += 1
        self._spread(topic, data, None)

    def _spread(self, topic: str, data: bytes, source: PeerId | None) -> None:
        for peer in list(self.peers):
            if peer != source and peer in self._fabric.nodes:
                self.nursery.start_soon(self._fabric.nodes[peer].hear, self.peer_id, topic, data)

    async def hear(self, peer: PeerId, topic: str, data: bytes) -> None:
        """A neighbour passes a message on; it may be lost, late, old or bad."""
        await self._fabric.pass_time()
        if self._fabric.lost() or peer not in self.peers or (topic, data) in self._seen:
            return
        self._seen.add((topic, data))
        subscribers = self._topics.get(topic, [])
        for validate, queue in subscribers:
            try:
                validate(peer, data)
            except RemoteProtocolError as error:
                self.counters.gossip_refused += 1
                self.penalise(peer, error)
                return
            self.counters.gossip_dropped += queue.put((peer, data))
        self.counters.gossip_in += 1
        self._spread(topic, data, peer)

    def subscribe(
        self, topic: Topic, validate: Validator, capacity: int
    ) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """Registers for a topic."""
        queue = Queue[tuple[PeerId, bytes]](capacity)
        self._topics.setdefault(topic, []).append((validate, queue))
        return queue.receiver

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new stream of events, beginning with those who are here."""
        queue = self._events.add(peer_events_max)
        for peer in self.peers.values():
            queue.put(PeerUp(peer))
        return queue.receiver

    def penalise(self, peer: PeerId, error: Exception) -> None:
        """Takes score; at `BAN_SCORE` the connection is cut for good."""
        if isinstance(error, NotYet):
            return
        self._scores[peer] = self._scores.get(peer, 0.0) + PENALTY
        self.counters.penalties += 1
        self._fabric.settle()

    def bans(self, peer: PeerId) -> bool:
        """Whether this node wants nothing to do with `peer`."""
        return self._scores.get(peer, 0.0) <= BAN_SCORE

    async def provide(self, key: bytes) -> None:
        """Tells the fabric's directory."""
        await self._fabric.pass_time()
        self._fabric.provided.setdefault(key, {})[self.peer_id] = None

    def withdraw(self, key: bytes) -> None:
        """Takes it back."""
        self._fabric.provided.get(key, {}).pop(self.peer_id, None)

    async def find_providers(self, key: bytes) -> list[PeerId]:
        """Asks the fabric's directory; who is beyond a partition is not found."""
        await self._fabric.pass_time()
        found = self._fabric.provided.get(key, {})
        return [peer for peer in found if peer in self.peers][:20]

    async def connect(self, addr: str) -> PeerId:
        """The peer at `/memory/ID/p2p/ID`, if it can be reached."""
        await self._fabric.pass_time()
        peer = PeerId(addr.rsplit("/", 1)[-1])
        if peer not in self.peers:
            raise PeerGone(peer, "cannot be reached")
        return peer

    def set_connected(self, other: "TwinNetwork", connected: bool) -> None:
        """For the fabric: `other` can, or cannot, be reached from now on."""
        if not connected:
            self.drop(other.peer_id)
        elif other.peer_id not in self.peers:
            peer = Peer(
                peer_id=other.peer_id,
                addrs=tuple(other.addrs),
                role=other._config.role,
                profile=other._config.profile,
                version=other._config.version,
                rtt_ms=1000 * sum(self._fabric.weather.delay_s),
                since=trio.current_time(),
                score=self._scores.get(other.peer_id, 0.0),
                summary=other.summary,
            )
            self.peers[other.peer_id] = peer
            self._events.put(PeerUp(peer))

    def drop(self, peer: PeerId) -> None:
        """For the fabric: the connection to `peer` is gone, with all that was asked of it."""
        if gone := self.peers.pop(peer, None):
            self.calls.cut(peer)
            self._events.put(PeerDown(gone))

    def disconnect_all(self) -> None:
        """For the fabric: we left."""
        for peer in list(self.peers):
            self.drop(peer)
