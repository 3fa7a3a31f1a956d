"""What services know of the network: peers, requests, gossip and providers.

There are two implementations, `network.Network` over libp2p and the in-process twin in
`blyan_node.testing.network`; a service that is written against `PeerNetwork` runs on both.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import trio

from protocols.hello import HelloSummary
from protocols.ids import NetworkId, PeerId
from protocols.limits import request_s_max
from protocols.wire import Messages

Topic = Literal["blocks", "adverts"]
Handler = Callable[[PeerId, Any], Awaitable[object]]
Validator = Callable[[PeerId, bytes], None]


@dataclass(frozen=True, slots=True)
class NetworkConfig:
    """What a node listens on, tells others and starts from.

    Addresses are multiaddrs; `bootstrap` ones end in `/p2p/ID`. `announce` replaces what the
    interfaces say. `psk` is the key of a private swarm, `allowed_peers` are those who may take part
    (None: everybody). `seed` feeds the jitter of redials and nothing else.
    """

    network_id: NetworkId
    network_name: str
    role: str
    version: str
    profile: str
    listen: tuple[str, ...] = ("/ip4/0.0.0.0/tcp/4040",)
    announce: tuple[str, ...] = ()
    bootstrap: tuple[str, ...] = ()
    psk: bytes | None = None
    allowed_peers: frozenset[PeerId] | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer that passed hello. `since` is in seconds of the Unix epoch; `rtt_ms` None if unknown.

    `addrs` end in `/p2p/ID`. `score` is 0 for a peer that did nothing wrong and falls from there.
    """

    peer_id: PeerId
    addrs: tuple[str, ...]
    role: str
    profile: str
    version: str
    rtt_ms: float | None
    since: float
    score: float
    summary: HelloSummary


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A peer passed hello and may be asked."""

    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The last connection to a peer is gone; everything asked of it has failed."""

    peer: Peer


PeerEvent = PeerUp | PeerDown


@dataclass(slots=True)
class Counters:
    """What passed since the start: frames' payloads in bytes, requests, gossip messages."""

    bytes_in: int = 0
    bytes_out: int = 0
    requests_sent: int = 0
    requests_served: int = 0
    gossip_in: int = 0
    gossip_out: int = 0
    gossip_dropped: int = 0
    gossip_refused: int = 0
    penalties: int = 0


class PeerNetwork(Protocol):
    """The network as a service sees it."""

    @property
    def peer_id(self) -> PeerId:
        """Our own id."""

    @property
    def addrs(self) -> list[str]:
        """Where others can reach us, each ending in `/p2p/ID`; known once running."""

    @property
    def peers(self) -> Mapping[PeerId, Peer]:
        """The connected peers that passed hello, at this moment."""

    @property
    def counters(self) -> Counters:
        """What passed since the start."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; started once it listens."""

    def handle(self, protocol: str, messages: Messages, handler: Handler) -> None:
        """Registers, before `run`, who answers requests on `protocol`.

        The handler may raise `Refused` (the asker sees `PeerRefused`) or `RemoteProtocolError`
        (the asker loses score), and is cancelled when the asker cancels or its stream ends. At most
        `handlers_per_peer_max` of a protocol run for one peer at a time. Anything else that it
        raises is a bug and stops the node.
        """

    async def request(
        self, peer: PeerId, protocol: str, message: object, *, timeout_s: float = request_s_max
    ) -> Any:
        """Asks and waits for the reply; `protocol` must be one that is handled here too.

        Raises `PeerGone`, `RequestTimeout`, `PeerRefused` or `RemoteProtocolError`. Cancelling it
        tells the peer, and drops the reply.
        """

    async def publish(self, topic: Topic, data: bytes) -> None:
        """Gossips `data` to everybody in the swarm; we do not get it ourselves."""

    def subscribe(
        self, topic: Topic, validate: Validator, capacity: int
    ) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """Registers, before `run`, for a topic: each message once, with the peer that passed it on.

        `validate` raises `RemoteProtocolError` for what must not spread. When `capacity` messages
        wait, the oldest is dropped and counted: gossip is a hint, sync is what catches up.
        """

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new stream of events; it begins with a `PeerUp` for each peer that is connected.

        A listener that lets `peer_events_max` events wait loses the oldest; `peers` has the truth.
        """

    def penalise(self, peer: PeerId, error: Exception) -> None:
        """Takes score from a peer that broke a rule; at the limit it is disconnected and banned."""

    async def provide(self, key: bytes) -> None:
        """Tells the DHT that we have what `key` (a CID) names; repeated until the node stops."""

    def withdraw(self, key: bytes) -> None:
        """Stops repeating what `provide` began."""

    async def find_providers(self, key: bytes) -> list[PeerId]:
        """Who says that it has what `key` names, asked anew of the DHT; at most 20."""

    async def connect(self, addr: str) -> PeerId:
        """Dials a multiaddr ending in `/p2p/ID` and waits for hello; raises `PeerGone`."""
