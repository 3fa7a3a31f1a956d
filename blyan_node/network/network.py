"""The node's network over libp2p: composition of the parts beside this module.

`Network` keeps what `interface.PeerNetwork` promises. One nursery runs everything; nothing that a
peer does raises into it, so what does raise is a bug of ours and stops the node.
"""

import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from blyan_node.network import greeting
from blyan_node.network.addressbook import AddressBook
from blyan_node.network.addresses import announced, parse_bootstrap, parse_listen, split_peer
from blyan_node.network.dialer import Dialer
from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.exchange import Exchange
from blyan_node.network.fanout import Fanout
from blyan_node.network.gossip import Gossip
from blyan_node.network.greeting import Greeted, Greeting
from blyan_node.network.host import ENDINGS, GuardedSwarm, build_host
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
from blyan_node.network.peers import PENALTY_BROKEN_RULE, PeerTable, Scores
from blyan_node.network.providers import Providers
from blyan_node.network.quiet import quiet_libp2p
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.hello import HelloSummary
from protocols.ids import PeerId
from protocols.limits import close_s_max, hello_s_max, peer_events_max, request_s_max
from protocols.signing import Identity
from protocols.wire import Messages

log = logging.getLogger("blyan.network")

_INTERFACES_EVERY_S = 10


class Network:
    """One node's network. See `PeerNetwork` for what each method promises."""

    def __init__(
        self,
        identity: Identity,
        config: NetworkConfig,
        hello_summary: Callable[[], HelloSummary] = HelloSummary,
    ) -> None:
        quiet_libp2p()
        self.peer_id = identity.peer_id
        self.counters = Counters()
        self._config = config
        self._listen = [parse_listen(addr) for addr in config.listen]
        self._table = PeerTable()
        self._scores = Scores()
        self._book = AddressBook(self.peer_id, Random(config.seed))
        self._know(config.bootstrap)
        self._announced: tuple[Sequence[str], list[str]] = ((), [])
        self._look_again = 0.0
        self._host = build_host(identity, self)
        swarm = self._host.get_network()
        assert isinstance(swarm, GuardedSwarm)
        self._swarm = swarm
        self._exchange = Exchange(self._host, self.counters, self._may_ask, self.penalise)
        self._gossip = Gossip(self._host, config.network_id, self.counters, self.penalise)
        self._providers = Providers(self._host)
        self._dialer = Dialer(self._swarm, self._book, self._all_connected, self.admits)
        self._greeting = Greeting(self, config, hello_summary, self._table, self._book)
        self._greeting.greeted = Greeted(self._passed, self._misfit, self._dialer.wake)
        self._events = Fanout[PeerEvent]()
        self._changed = trio.Event()
        self._keeping: set[PeerId] = set()
        self._nursery: trio.Nursery | None = None
        self.handle(greeting.PROTOCOL, greeting.MESSAGES, self._greeting.answer)

    # What services use

    @property
    def peers(self) -> Mapping[PeerId, Peer]:
        """The connected peers that passed hello."""
        return self._table

    @property
    def addrs(self) -> list[str]:
        """Where others can reach us."""
        return [str(addr) for addr in self._host.get_addrs()]

    def add_bootstrap(self, addresses: Iterable[str]) -> None:
        """Knows and dials these nodes from now on; raises `RemoteProtocolError` for a bad one."""
        self._know(addresses)
        self._dialer.wake()

    def _know(self, bootstrap: Iterable[str]) -> None:
        for text in bootstrap:
            addr, peer = parse_bootstrap(text)
            self._book.add_bootstrap(peer, addr)

    def handle(self, protocol: str, messages: Messages, handler: Handler) -> None:
        """Registers who answers on `protocol`."""
        self._exchange.handle(protocol, messages, handler)

    async def request(
        self, peer: PeerId, protocol: str, message: object, *, timeout_s: float = request_s_max
    ) -> Any:
        """Asks `peer`."""
        known = peer in self._table or protocol == greeting.PROTOCOL
        if not known or not self._swarm.get_connections(ID.from_base58(peer)):
            raise PeerGone(peer, "not connected")
        messages = self._exchange.messages(protocol)
        reply = await self._exchange.request(peer, protocol, messages, message, timeout_s)
        self._table.heard(peer, trio.current_time())
        return reply

    def subscribe(
        self, topic: Topic, validate: Validator, capacity: int
    ) -> trio.MemoryReceiveChannel[tuple[PeerId, bytes]]:
        """Registers for a topic."""
        return self._gossip.subscribe(topic, validate, capacity)

    async def publish(self, topic: Topic, data: bytes) -> None:
        """Gossips."""
        await self._gossip.publish(topic, data)

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new stream of events, beginning with those who are here."""
        queue = self._events.add(peer_events_max)
        for peer in self._table.values():
            queue.put(PeerUp(peer))
        return queue.receiver

    def penalise(self, peer: PeerId, error: Exception) -> None:
        """Takes score; at the limit the peer is disconnected and banned."""
        now = trio.current_time()
        self.counters.penalties += 1
        banned = self._scores.hurt(peer, PENALTY_BROKEN_RULE, now)
        self._table.scored(peer, self._scores.score(peer, now))
        level = logging.WARNING if banned else logging.INFO
        what = "is banned for a while" if banned else "broke a rule"
        log.log(level, "peer %s %s: %s", peer, what, str(error)[:300], extra={"peer": peer})
        if banned:
            self._disconnect_soon(peer)

    async def provide(self, key: bytes) -> None:
        """Tells the DHT that we have what `key` names, now and from time to time."""
        self._providers.provide(key)
        await trio.lowlevel.checkpoint()

    def withdraw(self, key: bytes) -> None:
        """Stops repeating what `provide` began."""
        self._providers.withdraw(key)

    async def find_providers(self, key: bytes) -> list[PeerId]:
        """Who says that it has what `key` names."""
        return await self._providers.find(key)

    async def connect(self, addr: str) -> PeerId:
        """Dials and waits for hello."""
        bare, peer = split_peer(addr)
        self._book.learn(peer, [bare], trio.current_time())
        self._book.worked(peer, bare)
        if peer not in self._table:
            why = await self._dialer.dial(peer)
            if why is not None:
                raise PeerGone(peer, why)
        with trio.move_on_after(hello_s_max):
            while peer not in self._table and self._swarm.get_connections(ID.from_base58(peer)):
                await self._changed.wait()
        if peer not in self._table:
            raise PeerGone(peer, "hello failed; the log says why")
        return peer

    # Running

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled, then says goodbye, all within `close_s_max`."""
        stop = trio.Event()

        async def notice_cancellation() -> None:
            try:
                await trio.sleep_forever()
            finally:
                stop.set()

        # libp2p's services clean up badly when they are cancelled: sockets stay open. So they are
        # shielded, and told to stop in their own way.
        async with trio.open_nursery() as outer:
            outer.start_soon(notice_cancellation)
            with trio.CancelScope(shield=True) as shield:
                async with self._stack(), trio.open_nursery() as nursery:
                    self._start(nursery)
                    task_status.started()
                    await stop.wait()
                    shield.deadline = trio.current_time() + close_s_max
                    await self._goodbye()
                    nursery.cancel_scope.cancel()
            outer.cancel_scope.cancel()

    @asynccontextmanager
    async def _stack(self) -> AsyncIterator[None]:
        for addr in self._listen:
            _check_free(addr)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._host.run([Multiaddr(a) for a in self._listen]))
            if len(self._swarm.listeners) < len(set(self._listen)):
                raise _cannot_listen(self._listen, "the address is not one of this machine")
            await stack.enter_async_context(self._gossip.running())
            await stack.enter_async_context(self._providers.running())
            yield

    def _start(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._exchange.serve(nursery)
        nursery.start_soon(self._dialer.run)
        nursery.start_soon(self._providers.run)
        nursery.start_soon(self._drop_silent)
        log.info(
            "listening on %s", " ".join(self.addrs) or "no address", extra={"addrs": self.addrs}
        )

    async def _goodbye(self) -> None:
        self._nursery = None
        with trio.move_on_after(close_s_max / 2):
            await self._swarm.stop_listening()
            async with trio.open_nursery() as nursery:
                for conn in self._swarm.get_connections():
                    nursery.start_soon(_close_quietly, conn.close)
        await self._swarm.abort_all()
        for peer in list(self._table):
            self.disconnected(peer)
        self._events.close()

    async def _drop_silent(self) -> None:
        while True:
            await trio.sleep(1)
            for peer in self._greeting.silent():
                log.info("peer %s is silent; disconnected", peer, extra={"peer": peer})
                self._disconnect_soon(peer)

    # What the host tells (`HostEvents`)

    def admits(self, peer: PeerId) -> bool:
        """Whether we want a connection with `peer`."""
        return peer != self.peer_id and not self._scores.banned(peer, trio.current_time())

    def announced(self, listening: Sequence[str]) -> list[str]:
        """The addresses to tell others; the interfaces are looked at now and then."""
        now = time.monotonic()  # asked for the first time before trio runs
        if now >= self._look_again or self._announced[0] != listening:
            self._announced = (listening, announced(listening, self._config.announce))
            self._look_again = now + _INTERFACES_EVERY_S
        return list(self._announced[1])

    def connected(self, peer: PeerId, *, dialled: bool) -> None:
        """A connection is up: the dialler says hello."""
        if dialled and self._nursery is not None:
            self._nursery.start_soon(self._greet, peer)

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""
        self._exchange.drop(peer)
        self._tell_change()
        if gone := self._table.remove(peer):
            self._book.lost(peer, trio.current_time())
            self._events.put(PeerDown(gone))
            log.info("peer %s down", peer, extra={"peer": peer})
        self._dialer.wake()

    def failed(self, peer: PeerId, protocol: str, error: Exception) -> None:
        """One of libp2p's own handlers raised."""
        if isinstance(error, ENDINGS):
            log.debug("stream %s of %s ended: %r", protocol, peer, error)
        else:
            self.penalise(peer, RemoteProtocolError(protocol, repr(error)[:200]))

    # Hello

    async def _greet(self, peer: PeerId) -> None:
        try:
            await self._greeting.begin(peer)
        except PeerRefused as refused:
            if refused.refused.code is not ErrorCode.NOT_FOUND:
                self._disconnect_soon(peer)
            return  # other software: it may stay for identify, ping, the DHT and pubsub
        except (PeerGone, RequestTimeout) as error:
            log.info("hello with %s failed: %s", peer, error, extra={"peer": peer})
            self._book.failed(peer, trio.current_time())
            self._disconnect_soon(peer)
            return
        except RemoteProtocolError as error:
            self.penalise(peer, error)
            self._disconnect_soon(peer)
            return
        if peer in self._table and peer not in self._keeping:
            self._keeping.add(peer)
            try:
                await self._greeting.keep(peer)
            finally:
                self._keeping.discard(peer)

    def _passed(self, peer: Peer) -> None:
        self._book.connected(peer.peer_id, trio.current_time())
        self._events.put(PeerUp(peer))
        log.info("peer %s up, role %s", peer.peer_id, peer.role, extra={"peer": peer.peer_id})
        self._tell_change()
        if self._nursery is not None:
            addrs = [addr.rpartition("/p2p/")[0] for addr in peer.addrs]
            self._nursery.start_soon(self._providers.met, peer.peer_id, addrs)

    def _misfit(self, peer: PeerId) -> None:
        self._book.refused(peer, trio.current_time())
        self._disconnect_soon(peer, after_s=1)

    async def _may_ask(self, peer: PeerId, protocol: str) -> bool:
        if protocol == greeting.PROTOCOL:
            return True
        with trio.move_on_after(hello_s_max):
            while peer not in self._table:  # the reply to our hello may still be on its way
                await self._changed.wait()
            return True
        self.penalise(peer, RemoteProtocolError(protocol, "spoken before hello"))
        return False

    # Small things

    def _all_connected(self) -> set[PeerId]:
        return {PeerId(str(peer)) for peer in self._swarm.get_connections_map()}

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _disconnect_soon(self, peer: PeerId, after_s: float = 0) -> None:
        async def disconnect() -> None:
            await trio.sleep(after_s)
            await _close_quietly(self._swarm.close_peer, ID.from_base58(peer))

        if self._nursery is not None:
            self._nursery.start_soon(disconnect)


async def _close_quietly(close: Callable[..., Any], *args: object) -> None:
    try:
        await close(*args)
    except Exception as error:  # py-libp2p's errors share no base; closing is best effort
        log.debug("while closing: %r", error)


def _check_free(addr: str) -> None:
    """Raises `Refused` if something listens there already.

    py-libp2p binds with SO_REUSEPORT: a second daemon on the port would steal half of the first
    one's connections and nobody would be told.
    """
    _, version, host, _, port = addr.split("/")
    family = socket.AF_INET6 if version == "ip6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise _cannot_listen([addr], error.strerror or str(error)) from None


def _cannot_listen(addrs: Sequence[str], why: str) -> Refused:
    return Refused(
        ErrorCode.BAD_INPUT,
        f"cannot listen on {' '.join(addrs)}",
        why,
        "stop what uses it, or choose another with --listen",
        {"addresses": list(addrs)},
    )
