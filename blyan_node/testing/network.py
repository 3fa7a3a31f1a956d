"""A network of nodes inside one process, with seeded delay, loss and partition.

`Fabric` is the medium, `TwinNetwork` one node's side of it with the interface of
`blyan_node.network.interface.PeerNetwork`. Every message passes through its codec, so that what
works here is encodable there. The same seed gives the same delays and losses, and under trio's
autojumping clock no test waits for them.
"""

import random
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
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
from protocols.errors import ErrorCode as Code
from protocols.errors import LocalProtocolError, NotYet, Refused, RemoteProtocolError
from protocols.hello import HelloSummary
from protocols.ids import NetworkId, PeerId, cid
from protocols.limits import (
    gossip_message_bytes_max,
    handlers_per_peer_max,
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
        self._handlers: dict[str, tuple[Messages, Handler]] = {}
        self._topics: dict[str, list[tuple[Validator, Queue[tuple[PeerId, bytes]]]]] = {}
        self._seen: set[tuple[str, bytes]] = set()
        self._events = Fanout[PeerEvent]()
        self._scores: dict[PeerId, float] = {}
        self._pending: dict[PeerId, dict[trio.CancelScope, None]] = {}
        self._limiters: dict[PeerId, trio.CapacityLimiter] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Is part of the fabric until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._fabric.join(self)
            try:
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._fabric.leave(self)
                self._nursery = None

    def kill(self) -> None:
        """Ends `run` from outside, as SIGKILL would."""
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    def handle(self, protocol: str, messages: Messages, handler: Handler) -> None:
        """Registers who answers on `protocol`."""
        if protocol in self._handlers:
            raise LocalProtocolError(f"{protocol} has a handler already")
        self._handlers[protocol] = (messages, handler)

    async def request(
        self, peer: PeerId, protocol: str, message: object, *, timeout_s: float = request_s_max
    ) -> Any:
        """Asks another node of the fabric."""
        if peer not in self.peers:
            raise PeerGone(peer, "not connected")
        codec = self._fabric.nodes[peer].codec(protocol, peer)
        sent = codec.encode(message)
        self.counters.requests_sent += 1
        self.counters.bytes_out += len(sent)
        with trio.move_on_after(timeout_s) as late, self._guard(peer) as cut:
            reply = await self._round_trip(peer, protocol, sent)
            self.counters.bytes_in += len(reply)
            return codec.decode(reply)
        if cut.cancelled_caught:
            raise PeerGone(peer, "the connection was cut")
        assert late.cancelled_caught
        raise RequestTimeout(peer, protocol, timeout_s)

    async def _round_trip(self, peer: PeerId, protocol: str, sent: bytes) -> bytes:
        await self._fabric.pass_time()
        if self._fabric.lost():
            await trio.sleep_forever()
        node = self._fabric.nodes.get(peer)
        if node is None:
            raise PeerGone(peer, "it left while the request was on its way")
        answered = trio.Event()
        outcome: list[bytes | Exception] = []

        async def serve() -> None:
            outcome.append(await node.serve(self.peer_id, protocol, sent))
            answered.set()

        serving = trio.CancelScope()
        node.nursery.start_soon(_within, serving, serve)
        try:
            await answered.wait()
        finally:
            serving.cancel()
        await self._fabric.pass_time()
        if isinstance(outcome[0], Refused):
            raise PeerRefused(peer, outcome[0])
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    @contextmanager
    def _guard(self, peer: PeerId) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as cut:
            pending = self._pending.setdefault(peer, {})
            pending[cut] = None
            try:
                yield cut
            finally:
                pending.pop(cut, None)

    async def serve(self, peer: PeerId, protocol: str, data: bytes) -> bytes | Exception:
        """Answers one request of `peer`; what the asker is to see as an exception is returned."""
        if protocol not in self._handlers:
            return Refused(Code.NOT_FOUND, f"{protocol} is not spoken here", "")
        messages, handler = self._handlers[protocol]
        self.counters.requests_served += 1
        self.counters.bytes_in += len(data)
        limiter = self._limiters.setdefault(peer, trio.CapacityLimiter(handlers_per_peer_max))
        async with limiter:
            try:
                reply = messages.encode(await handler(peer, messages.decode(data)))
            except Refused as refused:
                return refused
            except RemoteProtocolError as error:
                self.penalise(peer, error)
                return Refused(Code.BAD_INPUT, "the request is malformed", str(error))
        self.counters.bytes_out += len(reply)
        return reply

    def codec(self, protocol: str, asker: PeerId) -> Messages:
        """The messages of `protocol`, or PeerRefused as the asker would see it."""
        if protocol not in self._handlers:
            refused = Refused(Code.NOT_FOUND, f"{protocol} is not spoken here", "")
            raise PeerRefused(self.peer_id, refused)
        return self._handlers[protocol][0]

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
            for cut in self._pending.pop(peer, {}):
                cut.cancel()
            self._events.put(PeerDown(gone))

    def disconnect_all(self) -> None:
        """For the fabric: we left."""
        for peer in list(self.peers):
            self.drop(peer)


async def _within(scope: trio.CancelScope, work: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await work()
