"""The node's network over libp2p: composition of the parts beside this module.

`Network` keeps what `interface.PeerNetwork` promises. One nursery runs everything; nothing that a
peer does raises into it, so what does raise is a bug of ours and stops the node.
"""

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import trio
from multiaddr import Multiaddr

from blyan_node.network import greeting
from blyan_node.network.addressbook import AddressBook
from blyan_node.network.addresses import Announced, parse_bootstrap, parse_listen, split_peer
from blyan_node.network.dialer import Dialer
from blyan_node.network.errors import PeerGone
from blyan_node.network.exchange import Exchange
from blyan_node.network.gossip import Gossip
from blyan_node.network.greeting import Greeting
from blyan_node.network.host import GuardedSwarm, build_host
from blyan_node.network.interface import (
    Counters,
    Handler,
    NetworkConfig,
    Peer,
    PeerEvent,
    Topic,
    Validator,
)
from blyan_node.network.listening import cannot_listen, check_free
from blyan_node.network.membership import NOT_ALLOWED, Around, Membership, close_quietly
from blyan_node.network.providers import Providers
from blyan_node.network.quiet import quiet_libp2p
from blyan_node.network.reach import Reach
from blyan_node.network.relay import Relay
from blyan_node.network.traffic import Ledger
from protocols.hello import HelloSummary
from protocols.ids import PeerId
from protocols.limits import close_s_max, forget_every_s, hello_s_max, request_s_max
from protocols.signing import Identity
from protocols.wire import Messages

log = logging.getLogger("blyan.network")


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
        self._listen = [parse_listen(addr) for addr in config.listen]
        self._book = AddressBook(self.peer_id, Random(config.seed))
        self._know(config.bootstrap)
        self._leaving = False
        self._members = members = Membership(self.peer_id, self.counters, self._book)
        members.allowed = config.allowed_peers
        self._host = build_host(identity, members, Announced(config.announce), config.psk)
        swarm = self._host.get_network()
        assert isinstance(swarm, GuardedSwarm)
        self._swarm = swarm
        self._exchange = Exchange(self._host, self.counters, members.may_ask, members.penalise)
        self._gossip = Gossip(
            self._host,
            config.network_id,
            self.counters,
            members.penalise,
            members.allows,
            self._exchange.ledger,
        )
        self._providers = Providers(self._host)
        self._relay = relay = Relay(self._host, swarm, members)
        self._dialer = Dialer(swarm, self._book, members.connections, members.wants, relay.dial)
        self._greeting = Greeting(self, config, hello_summary, members.table, self._book)
        self._greeting.greeted = members.greeted()
        members.around = Around(
            swarm, self._exchange, self._dialer, self._greeting, self._providers
        )
        self.reach = Reach(self, swarm)
        self.handle(greeting.PROTOCOL, greeting.MESSAGES, self._greeting.answer)

    # What services use

    @property
    def peers(self) -> Mapping[PeerId, Peer]:
        """The connected peers that passed hello."""
        return self._members.table

    @property
    def ledger(self) -> Ledger:
        """What passed on the streams of each of our protocols."""
        return self._exchange.ledger

    @property
    def addrs(self) -> list[str]:
        """Where others can reach us; nowhere once we leave: a closed listener has no address."""
        return [] if self._leaving else [str(addr) for addr in self._host.get_addrs()]

    def add_bootstrap(self, addresses: Iterable[str]) -> None:
        """Knows and dials these nodes from now on; raises `RemoteProtocolError` for a bad one."""
        self._know(addresses)
        self._dialer.wake()

    def bootstrap(self) -> list[tuple[PeerId, str, str | None]]:
        """Each bootstrap address, with its peer and why the last dial failed, if it did."""
        return self._book.bootstrap()

    async def try_bootstrap(self) -> None:
        """Dials the bootstrap nodes that are not peers, whatever their backoff; waits for hello."""
        async with trio.open_nursery() as nursery:
            for peer in {peer for peer, _, _ in self._book.bootstrap()} - set(self.peers):
                if self._members.wants(peer):
                    nursery.start_soon(self._dial_and_greet, peer)

    async def _dial_and_greet(self, peer: PeerId) -> str | None:
        """Dials and waits for hello; why the dial failed."""
        why = await self._dialer.dial(peer)
        with trio.move_on_after(hello_s_max):
            while peer not in self.peers and self._members.is_connected(peer):
                await self._members.changed.wait()
        return why

    @property
    def turned_away(self) -> int:
        """How many connections did not begin as ours do, since the start."""
        return self._swarm.doorkeeper.turned_away

    def set_allowed(self, peers: frozenset[PeerId] | None) -> None:
        """From now on only these take part (None: everybody); others are disconnected."""
        self._members.allow(peers)

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
        known = peer in self.peers or protocol == greeting.PROTOCOL
        if not known or not self._members.is_connected(peer):
            raise PeerGone(peer, "not connected")
        if not self._members.serving:
            raise PeerGone(peer, "this node stops")
        messages = self._exchange.messages(protocol)
        reply = await self._exchange.request(peer, protocol, messages, message, timeout_s)
        self._members.table.heard(peer, trio.current_time())
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
        return self._members.events()

    def penalise(self, peer: PeerId, error: Exception) -> None:
        """Takes score; at the limit the peer is disconnected and banned."""
        self._members.penalise(peer, error)

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
        if not self._members.allows(peer):
            raise PeerGone(peer, NOT_ALLOWED)
        if peer not in self.peers:
            why = await self._dial_and_greet(peer)
            if why is not None and not self._members.is_connected(peer):
                raise PeerGone(peer, why)
        if peer not in self.peers:
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
            check_free(addr)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._host.run([Multiaddr(a) for a in self._listen]))
            if len(self._swarm.listeners) < len(set(self._listen)):
                raise cannot_listen(self._listen, "the address is not one of this machine")
            await stack.enter_async_context(self._gossip.running())
            await stack.enter_async_context(self._providers.running())
            yield

    def _start(self, nursery: trio.Nursery) -> None:
        self._exchange.serve(nursery)
        self._relay.serve()
        self._members.serve(nursery)
        nursery.start_soon(self._dialer.run)
        nursery.start_soon(self._providers.run)
        nursery.start_soon(self._forget_strangers)
        log.info(
            "listening on %s", " ".join(self.addrs) or "no address", extra={"addrs": self.addrs}
        )

    async def _forget_strangers(self) -> None:
        """libp2p keeps what it heard of every peer for ever."""
        while True:
            await trio.sleep(forget_every_s)
            self._swarm.forget_all_but(self._providers.routing_peers())

    async def _goodbye(self) -> None:
        self._leaving = True
        self._members.stop()
        with trio.move_on_after(close_s_max / 2):
            await self._swarm.stop_listening()
            async with trio.open_nursery() as nursery:
                for conn in self._swarm.get_connections():
                    nursery.start_soon(close_quietly, conn.close)
        await self._swarm.abort_all()
        self._members.close()
