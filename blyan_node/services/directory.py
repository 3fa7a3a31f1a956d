"""Adverts: says what this node holds, and knows what others hold.

A heartbeat is gossiped every `limits.advert_heartbeat_s` and soon after a change. A peer that has
just come up is asked for its advert. One DHT key per model (the model's id) is provided while
experts of it are held, and is asked for when nobody is known to hold what is needed. A peer that is
gone loses its advert at once, one that is silent when its lifetime is over; when this node stops it
withdraws its own.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import trio

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import PeerDown, PeerEvent, PeerNetwork
from blyan_node.services.changes import Changes
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.experts.advert import Advert, HeldExpert, Role, SignedAdvert, pack_held
from protocols.experts.directory import Directory
from protocols.experts.messages import MESSAGES, PROTOCOL, AdvertReply, AdvertRequest
from protocols.ids import BlockId, NetworkId, PeerId
from protocols.signing import Identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdvertConfig:
    """What this node's adverts say that does not change while it runs."""

    network: NetworkId
    role: Role
    profile: str
    auto: bool


class Advertised(Protocol):
    """What is advertised; `blyan_node.services.holding.Holding` is it."""

    changes: Changes

    def advertised(self) -> Iterable[HeldExpert]:
        """The experts that are held for others."""

    @property
    def memory_free(self) -> int:
        """Bytes that could still be held."""


class Adverts:
    """This node's adverts and its view of those of others (`directory`).

    `queue_length` says how many requests wait here, `clock_ms` is the wall clock: sequence numbers
    start from it so that they grow over restarts.
    """

    def __init__(
        self,
        network: PeerNetwork,
        identity: Identity,
        config: AdvertConfig,
        held: Advertised,
        queue_length: Callable[[], int],
        clock_ms: Callable[[], int],
    ) -> None:
        self.directory = Directory(lambda peer: peer in network.peers or peer == network.peer_id)
        self.changes = Changes()
        self.config = config
        self._network = network
        self._identity = identity
        self._held = held
        self._queue_length = queue_length
        self._clock_ms = clock_ms
        self._seq = 0
        self._provided: set[BlockId] = set()
        self._stopped = False
        network.handle(PROTOCOL, MESSAGES, self._answer)
        self._heard = network.subscribe("adverts", self._validate, limits.adverts_max)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Advertises and listens until cancelled, then withdraws."""
        events = self._network.peer_events()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            nursery.start_soon(self._expire)
            nursery.start_soon(self._provide)
            nursery.start_soon(self._follow_peers, events)
            task_status.started()
            try:
                await self._beat()
            finally:
                await self.withdraw()

    async def withdraw(self) -> None:
        """Tells everybody that this node holds nothing any more; the last advert of this run."""
        if not self._stopped:
            self._stopped = True
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self._network.publish("adverts", self._sign().encode())

    def holders(self, block: BlockId, profile: str | None = None) -> Sequence[PeerId]:
        """Other nodes of a profile, ours if none is named, that hold `block` and are connected."""
        profile = profile or self.config.profile
        return [p for p in self.holders_of_any_profile(block) if self.profile_of(p) == profile]

    def holders_of_any_profile(self, block: BlockId) -> Sequence[PeerId]:
        """Other nodes that hold `block`, and so store it, and are connected."""
        return [peer for peer in self.directory.holders(block) if peer in self._network.peers]

    def holders_with_self(self, block: BlockId) -> Sequence[PeerId]:
        """Every node that holds `block`, this one included."""
        return self.directory.holders(block)

    def set_auto(self, auto: bool) -> None:
        """Whether the next adverts say that this node takes experts by plan."""
        self.config = replace(self.config, auto=auto)

    def queue_of(self, peer: PeerId) -> int:
        """How many requests waited at `peer` when it last said so."""
        advert = self.directory.advert(peer)
        return advert.queue if advert else 0

    async def search(self, model: BlockId) -> None:
        """Asks the DHT who holds experts of `model`, and those found for their adverts."""
        for peer in await self._network.find_providers(model):
            if peer != self._network.peer_id and self.directory.advert(peer) is None:
                await self._ask(peer)

    def profile_of(self, peer: PeerId) -> str | None:
        """The numeric profile that `peer` computes with."""
        advert = self.directory.advert(peer)
        return advert.profile if advert else None

    def _sign(self) -> SignedAdvert:
        self._seq = max(self._seq + 1, self._clock_ms())
        held = [] if self._stopped else sorted(self._held.advertised())
        while (signed := self._sign_held(held)).size > limits.advert_bytes_max:
            held = held[: len(held) * 3 // 4]  # what an advert cannot say is not offered
        return signed

    def _sign_held(self, held: Iterable[HeldExpert]) -> SignedAdvert:
        return SignedAdvert.create(
            Advert(
                net=self.config.network,
                key=self._identity.public,
                seq=self._seq,
                lifetime_s=0 if self._stopped else limits.advert_lifetime_s,
                role=self.config.role,
                profile=self.config.profile,
                auto=self.config.auto,
                queue=self._queue_length(),
                memory_free=max(0, self._held.memory_free),
                models=pack_held(held),
            ),
            self._identity,
        )

    def _own(self) -> bytes:
        """A fresh advert of ours, which our own view takes as well."""
        signed = self._sign()
        self._apply(signed.advert)
        return signed.encode()

    async def _beat(self) -> None:
        while True:
            seen = self._held.changes.count
            await self._network.publish("adverts", self._own())
            with trio.move_on_after(limits.advert_heartbeat_s):
                await self._held.changes.wait(seen)
            await trio.sleep(limits.advert_pause_s)

    def _validate(self, source: PeerId, data: bytes) -> None:
        SignedAdvert.decode(data, net=self.config.network)

    async def _listen(self) -> None:
        async for _, data in self._heard:
            signed = SignedAdvert.decode(data, net=self.config.network)
            if signed.advert.peer != self._network.peer_id:
                self._apply(signed.advert)

    def _apply(self, advert: Advert) -> None:
        before = self.directory.held(advert.peer)
        self.directory.apply(advert, trio.current_time())
        if before != self.directory.held(advert.peer):
            self.changes.tell()

    async def _expire(self) -> None:
        while True:
            await trio.sleep(1)
            for peer in self.directory.expire(trio.current_time()):
                log.info("the advert of %s has expired", peer)
                self.changes.tell()

    async def _follow_peers(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async with trio.open_nursery() as nursery:
            async for event in events:
                peer = event.peer.peer_id
                if isinstance(event, PeerDown):
                    if peer not in self._network.peers and self.directory.remove(peer):
                        log.info("%s is gone, and its experts with it", peer)
                        self.changes.tell()
                else:
                    nursery.start_soon(self._ask, peer)

    async def _ask(self, peer: PeerId) -> None:
        """Asks a peer for its advert; one that does not answer is left to its heartbeats."""
        try:
            reply = await self._network.request(
                peer, PROTOCOL, AdvertRequest(), timeout_s=limits.advert_ask_s_max
            )
            self._apply(self._reply(peer, reply))
        except (PeerGone, PeerRefused, RequestTimeout) as error:
            log.debug("no advert from %s: %s", peer, error)
        except RemoteProtocolError as error:
            self._network.penalise(peer, error)

    def _reply(self, peer: PeerId, reply: object) -> Advert:
        if not isinstance(reply, AdvertReply):
            raise RemoteProtocolError(PROTOCOL, "not a reply")
        advert = SignedAdvert.decode(reply.advert, net=self.config.network).advert
        if advert.peer != peer:
            raise RemoteProtocolError(PROTOCOL, "the advert of another peer")
        return advert

    async def _answer(self, peer: PeerId, message: object) -> AdvertReply:
        if not isinstance(message, AdvertRequest):
            raise RemoteProtocolError(PROTOCOL, "not a request")
        return AdvertReply(self._own())

    async def _provide(self) -> None:
        """Keeps the DHT's record of the models of which experts are held."""
        while True:
            seen = self._held.changes.count
            models = {held.model for held in self._held.advertised()}
            for model in self._provided - models:
                self._network.withdraw(model)
            for model in sorted(models - self._provided):
                await self._network.provide(model)
            self._provided = models
            await self._held.changes.wait(seen)
