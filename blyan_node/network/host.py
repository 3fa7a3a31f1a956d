"""The libp2p host: Noise over TCP, yamux, identify, ping; and the one wrapper around handlers.

An exception that leaves a stream handler ends a stock host, and nearly all of them are a peer's
doing. So `GuardedSwarm` catches what leaves any handler and hands it to `HostEvents`. Our own
protocols do not run inside these handlers (see `channels`), so a bug of ours still stops the node.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import trio
from libp2p.abc import IMuxedConn, INetConn, INetStream
from libp2p.crypto.ed25519 import Ed25519PrivateKey
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key
from libp2p.custom_types import StreamHandlerFn, TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import IOException
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.exceptions import RawConnError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError, MultiselectError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from blyan_node.network.doorkeeper import Doorkeeper
from blyan_node.network.muxer import GuardedMuxer, GuardedYamux
from blyan_node.network.private import DoorUpgrader
from blyan_node.network.reasons import not_ours
from protocols.hello import PROTOCOL as HELLO
from protocols.ids import PeerId
from protocols.limits import (
    connections_per_peer_max,
    dial_s_max,
    handshakes_max,
    hello_s_max,
    peers_max,
)
from protocols.signing import Identity

log = logging.getLogger("blyan.network")


# What a peer that just leaves, or a link that breaks, looks like: no reason to blame anybody.
ENDINGS = (
    IOException,
    MultiselectCommunicatorError,
    MuxedStreamError,
    RawConnError,
    SwarmException,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
)


class HostEvents(Protocol):
    """What the host tells the network, and asks it."""

    def connected(self, peer: PeerId, *, dialled: bool) -> None:
        """A connection is up; hello has not been said."""

    def disconnected(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone."""

    def failed(self, peer: PeerId, protocol: str, error: Exception) -> None:
        """A handler of libp2p's own protocols raised."""

    def admits(self, peer: PeerId) -> bool:
        """Whether a connection with `peer` is wanted at all."""

    def allows(self, peer: PeerId) -> bool:
        """Whether `peer` may speak more than hello, by which it is told that it may not."""


class GuardedSwarm(Swarm):
    """A swarm that no peer can stop, wear out or wedge."""

    events: HostEvents
    handshakes: dict[trio.CancelScope, None]  # of those that dialled us, the oldest first
    doorkeeper: Doorkeeper

    def set_stream_handler(self, stream_handler: StreamHandlerFn) -> None:
        """Wraps the one handler behind which all protocols are."""

        async def guarded(stream: INetStream) -> None:
            try:
                await stream_handler(stream)
            except Exception as error:  # py-libp2p's errors share no base; a peer causes them
                peer = PeerId(str(stream.muxed_conn.peer_id))
                self.events.failed(peer, str(stream.get_protocol()), error)
                await stream.reset()

        super().set_stream_handler(guarded)

    async def add_conn(self, muxed_conn: IMuxedConn, direction: str = "unknown") -> SwarmConn:
        """Admits a connection whose other end has proved who it is."""
        peer = PeerId(str(muxed_conn.peer_id))
        if not self.events.admits(peer):
            await muxed_conn.close()
            raise SwarmException(f"peer {peer} is not admitted")
        conn = await super().add_conn(muxed_conn, direction)
        if conn.is_closed:
            # It ended while it was being registered: the stock swarm would list it for ever, as a
            # peer that seems connected and a slot that is never free.
            self.remove_conn(conn)
            raise SwarmException(f"the connection with {peer} ended at once")
        if conn not in self.get_connections(muxed_conn.peer_id)[:connections_per_peer_max]:
            await conn.close()  # the stock swarm would keep all that come within 20 s
            raise SwarmException(f"peer {peer} has {connections_per_peer_max} connections")
        self.events.connected(peer, dialled=direction == "outbound")
        return conn

    def remove_conn(self, swarm_conn: SwarmConn) -> None:
        """Forgets a connection; tells of it at once, where the stock event comes 0.1 s later."""
        known = swarm_conn in self.get_connections(swarm_conn.muxed_conn.peer_id)
        super().remove_conn(swarm_conn)
        if known and not self.get_connections(swarm_conn.muxed_conn.peer_id):
            self.events.disconnected(PeerId(str(swarm_conn.muxed_conn.peer_id)))

    async def _handle_inbound_connection(
        self, read_write_closer: ReadWriteCloser, maddr: Multiaddr
    ) -> None:
        # The stock method gives each connection a slot before it has said a word, and holds it
        # until the swarm ends: after as many connections as there are slots, however short or
        # silent, nobody is let in any more. Here the silent ones push out each other.
        raw = RawConnection(read_write_closer, False)
        handshake = trio.CancelScope()
        self.handshakes[handshake] = None
        if len(self.handshakes) > handshakes_max:
            next(iter(self.handshakes)).cancel()
        muxed = None
        try:
            with handshake:
                muxed = await self.upgrade_inbound_raw_conn(raw, maddr)
        except Exception as error:  # garbage in a handshake; py-libp2p's errors share no base
            log.debug("inbound connection failed: %r", error)
            if (stranger := not_ours(error)) is not None:
                host, _ = raw.get_remote_address() or ("an address that is gone", 0)
                self.doorkeeper.turn_away(host, str(stranger), trio.current_time())
        finally:
            del self.handshakes[handshake]
            if muxed is None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await raw.close()
        if muxed is not None:
            assert isinstance(muxed, GuardedYamux)
            await muxed.event_closed.wait()

    async def dial_peer(self, peer_id: ID) -> list[INetConn]:
        """The connections that there are: whom we dial, the address book decides.

        The stock method dials what the peer store has. Anybody fills that: the DHT dials all whom
        an answer names, wherever the answer says.
        """
        if not (here := self.get_connections(peer_id)):
            raise SwarmException(f"peer {peer_id} is not connected")
        return here

    def host_of(self, peer_id: ID) -> str:
        """The IP address at the other end of a connection with the peer; "" if it is relayed."""
        for conn in self.get_connections(peer_id):
            assert isinstance(conn.muxed_conn, GuardedYamux)
            if remote := conn.muxed_conn.get_remote_address():
                return remote[0]
        return ""

    async def close_peer(self, peer_id: ID) -> None:
        """Closes what there is; the stock method also forgets a connection that comes meanwhile."""
        for conn in list(self.get_connections(peer_id)):
            await conn.close()

    def forget_all_but(self, others: Collection[ID]) -> None:
        """Forgets what was heard of peers that are neither connected nor among `others`."""
        kept = {self.get_peer_id(), *self.get_connections_map(), *others}
        store = self.peerstore
        assert isinstance(store, PeerStore)
        for peer in set(store.peer_ids()) - kept:
            store.clear_peerdata(peer)
        for peer in set(store.peer_record_map) - kept:
            del store.peer_record_map[peer]

    async def stop_listening(self) -> None:
        """Closes the listeners, which the stock swarm leaves open when its service is stopped."""
        for listener in list(self.listeners.values()):
            await listener.close()
        self.listeners.clear()

    async def abort_all(self) -> None:
        """Closes every socket at once, for when closing politely takes too long."""
        for conn in self.get_connections():
            assert isinstance(conn.muxed_conn, GuardedYamux)
            await conn.muxed_conn.abort()


class NoAutoConnector(AutoConnector):
    """The stock one dials strangers whatever the watermarks say; whom we dial, the book decides."""

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Does nothing."""

    async def maybe_connect(self) -> None:
        """Does nothing."""

    def record_disconnect(self, peer_id: ID) -> None:
        """Does nothing: the stock one remembers everybody who ever left."""


class GuardedHost(BasicHost):
    """Identify runs in trio's system tasks, where an exception would end the process."""

    async def _swarm_stream_handler(self, net_stream: INetStream) -> None:
        """Whoever is not among a network's peers is answered on hello, and on nothing else."""
        swarm = self._network
        assert isinstance(swarm, GuardedSwarm)
        if swarm.events.allows(PeerId(str(net_stream.muxed_conn.peer_id))):
            await super()._swarm_stream_handler(net_stream)
            return
        hello = TProtocol(HELLO)
        handler = self.multiselect.handlers[hello]
        assert handler is not None
        try:
            await Multiselect({hello: handler}).negotiate(
                MultiselectCommunicator(net_stream), hello_s_max
            )
        except MultiselectError:
            await net_stream.reset()
            return
        net_stream.set_protocol(hello)
        await handler(net_stream)

    async def _identify_peer(self, peer_id: ID, *, reason: str) -> None:
        try:
            await super()._identify_peer(peer_id, reason=reason)
        except Exception as error:  # py-libp2p's errors share no base; a peer causes them
            log.debug("identify of %s failed: %r", peer_id, error)


def build_host(
    identity: Identity,
    events: HostEvents,
    announced: Callable[[Sequence[str]], list[str]],
    psk: bytes | None = None,
) -> GuardedHost:
    """A host that does not run yet; `announced` says which addresses to tell.

    Noise alone: the default would accept plaintext too. `psk` is the key of a private swarm.
    """
    private = Ed25519PrivateKey.from_bytes(identity.seed)
    keys = KeyPair(private, private.get_public_key())
    peer = ID.from_pubkey(keys.public_key)
    noise = NoiseTransport(keys, noise_privkey=create_noise_key().private_key)
    upgrader = DoorUpgrader({NOISE: noise}, {TProtocol(YAMUX): GuardedYamux})
    upgrader.key = psk
    upgrader.muxer_multistream = GuardedMuxer({TProtocol(YAMUX): GuardedYamux}, hello_s_max)
    peerstore = PeerStore()
    peerstore.add_key_pair(peer, keys)
    swarm = GuardedSwarm(
        peer,
        peerstore,
        upgrader,
        transports=[TCP()],
        retry_config=RetryConfig(max_retries=0),  # we redial with our own backoff
        connection_config=ConnectionConfig(
            max_connections=peers_max,
            max_connections_per_peer=connections_per_peer_max,
            high_watermark=peers_max,
            min_connections=0,
            low_watermark=0,
            inbound_upgrade_timeout=hello_s_max,
            outbound_upgrade_timeout=hello_s_max,
            dial_timeout=dial_s_max,
        ),
    )
    swarm.events = events
    swarm.handshakes = {}
    swarm.doorkeeper = Doorkeeper(logging.WARNING if psk else logging.INFO)
    swarm.auto_connector = NoAutoConnector(swarm)
    return GuardedHost(
        swarm,
        addrs_factory=lambda found: [Multiaddr(a) for a in announced([*map(str, found)])],
        disable_identify_address_discovery=True,
    )
