"""Provider records in the Kademlia DHT.

py-libp2p 0.8.1 ignores a node's provides beyond 10 in 10 s while both ends believe in success, so
ours are paced; it answers lookups from a cache of 48 h, so that is set aside for each lookup; its
routing table knows nobody until told, and keys must be real multihashes.
"""

import logging
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from libp2p.abc import IHost, INetStream
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from libp2p.tools.anyio_service.context import background_trio_service
from multiaddr import Multiaddr

from protocols.errors import LocalProtocolError
from protocols.ids import PeerId, is_cid
from protocols.limits import (
    dht_stream_s_max,
    dht_streams_per_peer_max,
    find_providers_s_max,
    peers_max,
    provide_every_s,
    provide_s_max,
    provider_records_max,
    providers_max,
    provides_10_s_max,
)

log = logging.getLogger("blyan.network")

_CID_BEFORE_MULTIHASH = 2  # version and codec


class GuardedDHT(KadDHT):
    """A DHT that answers everybody, whoever holds its streams open or fills its memory.

    The stock one serves 12 streams at a time for as long as their owners like, and keeps as many
    provider records as it is told.
    """

    def __init__(self, host: IHost) -> None:
        # Strict: values are of no use to us, and strangers could fill memory with them.
        super().__init__(host, DHTMode.SERVER, strict_validation=True, max_peers_per_subnet=0)
        self._serving: Counter[ID] = Counter()

    async def handle_stream(self, stream: INetStream) -> None:
        """Serves a stream for `dht_stream_s_max`; of one peer `dht_streams_per_peer_max`."""
        peer = stream.muxed_conn.peer_id
        if self._serving[peer] >= dht_streams_per_peer_max:
            await stream.reset()
            return
        self._serving[peer] += 1
        try:
            with trio.move_on_after(dht_stream_s_max) as late:
                await super().handle_stream(stream)
        finally:
            self._serving[peer] -= 1
            if not self._serving[peer]:
                del self._serving[peer]
        if late.cancelled_caught:
            await stream.reset()

    def _check_provider_rate_limit(self, peer_id: ID) -> bool:
        allowed: bool = super()._check_provider_rate_limit(peer_id)
        if len(self._provider_rate_limits) > 2 * peers_max:
            del self._provider_rate_limits[next(iter(self._provider_rate_limits))]
        if allowed:
            self.make_room()
        return allowed

    def make_room(self) -> None:
        """Where there are too many records, one of the peer that has most of them goes."""
        kept = self.provider_store.providers
        records = [(peer, key) for key, peers in kept.items() for peer in peers]
        if len(records) >= provider_records_max:
            most, _ = Counter(peer for peer, _ in records).most_common(1)[0]
            key = next(key for peer, key in records if peer == most)
            del kept[key][most]
            if not kept[key]:
                del kept[key]


class Providers:
    """Our provider records, and lookups of others'."""

    def __init__(self, host: IHost) -> None:
        self._own = host.get_id()
        self._dht = GuardedDHT(host)
        self._host = host
        self._due: dict[bytes, float] = {}
        self._changed = trio.Event()
        self._one_lookup = trio.Lock()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The DHT serves inside this block."""
        async with background_trio_service(self._dht):
            yield

    def routing_peers(self) -> list[ID]:
        """Those in the routing table, whose addresses the DHT needs."""
        return list(self._dht.routing_table.get_peer_ids())

    async def met(self, peer: PeerId, addrs: list[str]) -> None:
        """Somebody to ask: the routing table learns nobody from connections alone."""
        try:
            info = PeerInfo(ID.from_base58(peer), [Multiaddr(addr) for addr in addrs])
            with trio.move_on_after(find_providers_s_max):  # a full bucket pings its oldest
                await self._dht.routing_table.add_peer(info, skip_server_mode_check=True)
        except Exception as error:  # py-libp2p's errors share no base; a missing entry is no harm
            log.debug("routing table: %r", error)
        self._all_due_within(2.0)

    def left(self, peer: PeerId) -> None:
        """Nobody to ask any more; `met` tells when it is back."""
        self._dht.routing_table.remove_peer(ID.from_base58(peer))

    def provide(self, key: bytes) -> None:
        """From now on we are told as a provider of the CID `key`, again and again."""
        self._due.setdefault(_multihash(key), trio.current_time())
        self._changed.set()

    def withdraw(self, key: bytes) -> None:
        """Ends what `provide` began; records that others keep run out by themselves."""
        multihash = _multihash(key)
        self._due.pop(multihash, None)
        store = self._dht.provider_store
        store.providing_keys.discard(multihash)
        store.providers.get(multihash, {}).pop(str(self._own), None)

    async def find(self, key: bytes) -> list[PeerId]:
        """Who is said to provide `key`: by the network now, or by records that came to us."""
        multihash = _multihash(key)
        store = self._dht.provider_store
        async with self._one_lookup:
            kept = store.providers.pop(multihash, {})
            found: list[PeerInfo] = []
            try:
                with trio.move_on_after(find_providers_s_max):
                    found = await store.find_providers(multihash, providers_max)
            except Exception as error:  # py-libp2p's errors share no base; nothing found is said
                log.debug("lookup failed: %r", error)
            finally:
                if kept:
                    store.providers[multihash] = kept | store.providers.get(multihash, {})
        own = [r.peer_id for r in kept.values() if not r.is_expired()]
        ids = dict.fromkeys([*(info.peer_id for info in found), *own])
        ids.pop(self._own, None)
        here = self._host.get_network().get_connections_map()  # false records name anybody
        first = sorted(ids, key=lambda peer: peer not in here)
        return [PeerId(str(peer)) for peer in first[:providers_max]]

    async def run(self) -> None:
        """Provides what is due, at a pace that other nodes do not ignore."""
        while True:
            self._changed = trio.Event()
            now = trio.current_time()
            due = min(self._due, key=lambda k: self._due[k], default=None)
            wait = self._due[due] - now if due is not None else float("inf")
            if due is None or wait > 0:
                with trio.move_on_after(wait):
                    await self._changed.wait()
                continue
            self._due[due] = now + provide_every_s
            try:
                with trio.move_on_after(provide_s_max):
                    await self._dht.provider_store.provide(due)
            except Exception as error:  # py-libp2p's errors share no base; it is tried again
                log.debug("provide failed: %r", error)
            await trio.sleep(10 / provides_10_s_max)

    def _all_due_within(self, seconds: float) -> None:
        soon = trio.current_time() + seconds
        for key, due in self._due.items():
            self._due[key] = min(due, soon)
        self._changed.set()


def _multihash(key: bytes) -> bytes:
    if not is_cid(key):
        raise LocalProtocolError("a DHT key that is no CID")
    return key[_CID_BEFORE_MULTIHASH:]
