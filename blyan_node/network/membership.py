"""Who is in the swarm as we see it: whom we let in, who passed hello, who is thrown out.

A connection begins as a stranger's. Hello makes a peer of it, and services are told. Who says
nothing of the kind is other libp2p software, welcome as long as there are few of it: when there are
more than `strangers_max`, the one that came first is disconnected, so that connections without
hello cannot take all the places. Who breaks rules loses score, and at the limit the connection.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.peer.id import ID

from blyan_node.network.addressbook import AddressBook
from blyan_node.network.addresses import is_own
from blyan_node.network.dialer import Dialer
from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.exchange import Exchange
from blyan_node.network.fanout import Fanout
from blyan_node.network.greeting import PROTOCOL as HELLO
from blyan_node.network.greeting import Greeted, Greeting
from blyan_node.network.host import ENDINGS, GuardedSwarm
from blyan_node.network.interface import Counters, Peer, PeerDown, PeerEvent, PeerUp
from blyan_node.network.peers import PENALTY_BROKEN_RULE, PeerTable, Scores
from blyan_node.network.providers import Providers
from protocols.errors import ErrorCode, NotYet, RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import hello_s_max, peer_events_max, strangers_max

log = logging.getLogger("blyan.network")

NOT_ALLOWED = "it is not among the peers that this node lets in (allowed_peers)"


@dataclass(frozen=True)
class Around:
    """The parts of the network that membership acts on."""

    swarm: GuardedSwarm
    exchange: Exchange
    dialer: Dialer
    greeting: Greeting
    providers: Providers


class Membership:
    """Keeps `table`; is what the host tells of connections (`HostEvents`)."""

    around: Around
    allowed: frozenset[PeerId] | None = None  # who may take part; None: everybody

    def __init__(self, own: PeerId, counters: Counters, book: AddressBook) -> None:
        self.table = PeerTable()
        self.changed = trio.Event()
        self._own = own
        self._counters = counters
        self._book = book
        self._scores = Scores()
        self._strangers: dict[PeerId, None] = {}
        self._keeping: set[PeerId] = set()
        self._events = Fanout[PeerEvent]()
        self._nursery: trio.Nursery | None = None

    def greeted(self) -> Greeted:
        """What greeting is to tell us."""
        return Greeted(
            self.is_connected,
            self.allows,
            self._is_here,
            self._passed,
            self._misfit,
            self._wake_dialer,
        )

    def serve(self, nursery: trio.Nursery) -> None:
        """From now on newcomers are greeted; tasks run in `nursery`."""
        self._nursery = nursery
        nursery.start_soon(self._drop_silent)

    def close(self) -> None:
        """Every peer is gone, and no event follows."""
        for peer in list(self.table):
            self.disconnected(peer)
        self._events.close()

    def stop(self) -> None:
        """Nothing new is begun from now on."""
        self._nursery = None

    @property
    def serving(self) -> bool:
        """Whether this node runs and does not stop yet."""
        return self._nursery is not None

    def events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new stream of events, beginning with those who are here."""
        queue = self._events.add(peer_events_max)
        for peer in self.table.values():
            queue.put(PeerUp(peer))
        return queue.receiver

    def is_connected(self, peer: PeerId) -> bool:
        """Whether there is a connection, whatever has been said on it."""
        return bool(self.around.swarm.get_connections(ID.from_base58(peer)))

    def connections(self) -> set[PeerId]:
        """Everybody with whom there is a connection."""
        return {PeerId(str(peer)) for peer in self.around.swarm.get_connections_map()}

    async def may_ask(self, peer: PeerId, protocol: str) -> bool:
        """Whether `peer` may speak `protocol`: after hello, for which it is given time."""
        if protocol == HELLO:
            return True
        with trio.move_on_after(hello_s_max):
            while peer not in self.table:  # the reply to our hello may still be on its way
                if not self.is_connected(peer):
                    return False
                await self.changed.wait()
            return True
        self.penalise(peer, RemoteProtocolError(protocol, "spoken before hello"))
        return False

    def penalise(self, peer: PeerId, error: Exception) -> None:
        """Takes score; at the limit the peer is disconnected and banned.

        What is only too early by our clock (`NotYet`) costs nothing: the peer's may be right.
        """
        if isinstance(error, NotYet):
            log.info("peer %s is early: %s", peer, str(error)[:300], extra={"peer": peer})
            return
        now = trio.current_time()
        self._counters.penalties += 1
        banned = self._scores.hurt(peer, PENALTY_BROKEN_RULE, now)
        self.table.scored(peer, self._scores.score(peer, now))
        level = logging.WARNING if banned else logging.INFO
        what = "is banned for a while" if banned else "broke a rule"
        log.log(level, "peer %s %s: %s", peer, what, str(error)[:300], extra={"peer": peer})
        if banned:
            self._disconnect_soon(peer)

    # What the host tells (`HostEvents`)

    def admits(self, peer: PeerId) -> bool:
        """Whether we want a connection with `peer`."""
        return peer != self._own and not self._scores.banned(peer, trio.current_time())

    def allows(self, peer: PeerId) -> bool:
        """Whether `peer` may take part in the network."""
        return self.allowed is None or peer in self.allowed

    def wants(self, peer: PeerId) -> bool:
        """Whether to dial `peer`."""
        return self.admits(peer) and self.allows(peer)

    def knows(self, peer: PeerId) -> bool:
        """Whether `peer` is connected and passed hello."""
        return peer in self.table

    def nearest(self) -> list[PeerId]:
        """Our peers, those with the shortest round trip first."""
        far = float("inf")
        return sorted(self.table, key=lambda peer: (self.table[peer].rtt_ms or far, peer))

    def allow(self, peers: frozenset[PeerId] | None) -> None:
        """Lets in only these from now on, and disconnects the others."""
        self.allowed = peers
        for peer in self.connections():
            if not self.allows(peer):
                log.warning("peer %s: %s", peer, NOT_ALLOWED, extra={"peer": peer})
                self._disconnect_soon(peer)
        self._wake_dialer()

    def connected(self, peer: PeerId, *, dialled: bool) -> None:
        """A connection is up: the dialler says hello."""
        if peer not in self.table:
            self._strangers.setdefault(peer)
            if len(self._strangers) > strangers_max:
                first = next(iter(self._strangers))
                del self._strangers[first]
                self._disconnect_soon(first)
        if self._nursery is not None and not self.allows(peer):
            self._nursery.start_soon(self._turn_out, peer)
        if dialled and self._nursery is not None:
            self._nursery.start_soon(self._greet, peer)

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""
        self._strangers.pop(peer, None)
        self.around.exchange.drop(peer)
        self.around.providers.left(peer)
        self._tell_change()
        if gone := self.table.remove(peer):
            self._book.lost(peer, trio.current_time())
            self._events.put(PeerDown(gone))
            log.info("peer %s down", peer, extra={"peer": peer})
        self._wake_dialer()

    def failed(self, peer: PeerId, protocol: str, error: Exception) -> None:
        """One of libp2p's own handlers raised."""
        if isinstance(error, ENDINGS):
            log.debug("stream %s of %s ended: %r", protocol, peer, error)
        else:
            self.penalise(peer, RemoteProtocolError(protocol, repr(error)[:200]))

    # Hello

    async def _greet(self, peer: PeerId) -> None:
        greeting = self.around.greeting
        try:
            await greeting.begin(peer)
        except PeerRefused as refused:
            self._book.refused(peer, trio.current_time(), str(refused.refused)[:300])
            if refused.refused.code is not ErrorCode.NOT_FOUND:
                greeting.say_once(peer, f"refuses us: {refused.refused}"[:300])
                self._disconnect_soon(peer)
            return  # other software: it may stay for identify, ping, the DHT and pubsub
        except (PeerGone, RequestTimeout) as error:
            log.info("hello with %s failed: %s", peer, error, extra={"peer": peer})
            self._book.failed(peer, trio.current_time(), f"hello failed: {error}")
            self._disconnect_soon(peer)
            return
        except RemoteProtocolError as error:
            self.penalise(peer, error)
            self._book.failed(peer, trio.current_time(), f"hello failed: {error}"[:300])
            self._disconnect_soon(peer)
            return
        if peer in self.table and peer not in self._keeping:
            self._keeping.add(peer)
            try:
                await greeting.keep(peer)
            finally:
                self._keeping.discard(peer)

    def _passed(self, peer: Peer) -> None:
        self._strangers.pop(peer.peer_id, None)
        self._book.connected(peer.peer_id, trio.current_time())
        self._events.put(PeerUp(peer))
        log.info("peer %s up, role %s", peer.peer_id, peer.role, extra={"peer": peer.peer_id})
        self._tell_change()
        if self._nursery is not None:
            addrs = [addr.rpartition("/p2p/")[0] for addr in peer.addrs]
            self._nursery.start_soon(self.around.providers.met, peer.peer_id, addrs)

    def _misfit(self, peer: PeerId, why: str) -> None:
        self._book.refused(peer, trio.current_time(), why)
        self._disconnect_soon(peer, after_s=1)

    async def _drop_silent(self) -> None:
        while True:
            await trio.sleep(1)
            for peer in self.around.greeting.silent():
                log.info("peer %s is silent; disconnected", peer, extra={"peer": peer})
                self._disconnect_soon(peer)

    async def _turn_out(self, peer: PeerId) -> None:
        """Who is not allowed has time to say hello and hear why; who says nothing goes as well."""
        await trio.sleep(hello_s_max)
        if not self.allows(peer):
            self._disconnect_soon(peer)

    # Small things

    def _is_here(self, peer: PeerId) -> bool:
        return is_own(self.around.swarm.host_of(ID.from_base58(peer)))

    def _tell_change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def _wake_dialer(self) -> None:
        self.around.dialer.wake()

    def _disconnect_soon(self, peer: PeerId, after_s: float = 0) -> None:
        async def disconnect() -> None:
            await trio.sleep(after_s)
            await close_quietly(self.around.swarm.close_peer, ID.from_base58(peer))

        if self._nursery is not None:
            self._nursery.start_soon(disconnect)


async def close_quietly(close: Callable[..., Any], *args: object) -> None:
    """Closes a connection, or leaves it."""
    try:
        await close(*args)
    except Exception as error:  # py-libp2p's errors share no base; closing is best effort
        log.debug("while closing: %r", error)
