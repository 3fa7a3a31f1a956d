"""What a node holds is known to others soon, and forgotten soon after it is gone."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from blyan_node.services.changes import Changes
from blyan_node.services.directory import AdvertConfig, Adverts
from blyan_node.testing.network import NETWORK, Fabric, TwinNetwork, Weather
from blyan_node.testing.virtual_time import virtual_time_test
from protocols.experts.advert import HeldExpert, SignedAdvert
from protocols.experts.messages import PROTOCOL, AdvertReply, AdvertRequest
from protocols.ids import BlockId, PeerId, cid
from protocols.signing import Identity

MODEL = BlockId(cid(b"model"))
ONE = HeldExpert(MODEL, 0, 1, BlockId(cid(b"one")))
TWO = HeldExpert(MODEL, 0, 2, BlockId(cid(b"two")))


@dataclass
class Shelf:
    """What a node holds, as far as adverts care."""

    experts: list[HeldExpert] = field(default_factory=list)
    memory_free: int = 1000
    changes: Changes = field(default_factory=Changes)

    def advertised(self) -> Iterable[HeldExpert]:
        return list(self.experts)

    def put(self, *experts: HeldExpert) -> None:
        self.experts = list(experts)
        self.changes.tell()


@dataclass
class Node:
    network: TwinNetwork
    shelf: Shelf
    adverts: Adverts
    services: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def id(self) -> PeerId:
        return self.network.peer_id

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.network.run)
            with self.services:
                await self.adverts.run()
            nursery.cancel_scope.cancel()


def make(fabric: Fabric, name: str, profile: str = "cpu") -> Node:
    identity = Identity.from_seed(name.encode().ljust(32, b"\0"))
    network, shelf = fabric.node(identity), Shelf()
    config = AdvertConfig(NETWORK, "gpu", profile, True)
    start = 1_800_000_000_000
    adverts = Adverts(
        network, identity, config, shelf, lambda: 3, lambda: start + int(trio.current_time() * 1000)
    )
    return Node(network, shelf, adverts)


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            nursery.start_soon(node.run)
        await trio.sleep(0.1)
        yield nursery
        nursery.cancel_scope.cancel()


@virtual_time_test
async def test_a_change_is_known_long_before_the_next_heartbeat() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    async with running(alice, bob):
        await trio.sleep(2)
        bob.shelf.put(ONE, TWO)
        seen = alice.adverts.changes.count
        with trio.fail_after(1):
            await alice.adverts.changes.wait(seen)
        assert alice.adverts.holders(ONE.block) == [bob.id]
        assert bob.adverts.holders_with_self(ONE.block) == [bob.id]
        assert bob.adverts.holders(ONE.block) == []
        assert alice.adverts.queue_of(bob.id) == 3
        await trio.sleep(60)
        assert alice.adverts.holders(TWO.block) == [bob.id]


@virtual_time_test
async def test_a_late_joiner_asks_at_once() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    bob.shelf.put(ONE)
    async with running(bob) as nursery:
        await trio.sleep(2.6)
        nursery.start_soon(alice.run)
        await trio.sleep(0.2)
        assert alice.adverts.holders(ONE.block) == [bob.id]


@virtual_time_test
async def test_a_stopped_nodes_adverts_are_gone_at_once() -> None:
    fabric = Fabric(1)
    alice, bob, carol = (make(fabric, name) for name in ("alice", "bob", "carol"))
    bob.shelf.put(ONE)
    async with running(alice, bob, carol):
        await trio.sleep(6)
        assert alice.adverts.holders(ONE.block) == [bob.id]
        bob.services.cancel()
        await trio.sleep(1)
        assert alice.adverts.holders_with_self(ONE.block) == []
        await trio.sleep(30)
        assert carol.adverts.holders_with_self(ONE.block) == []


@virtual_time_test
async def test_a_killed_nodes_adverts_go_with_its_connection() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    bob.shelf.put(ONE)
    async with running(alice, bob):
        await trio.sleep(1)
        assert alice.adverts.holders(ONE.block) == [bob.id]
        bob.network.kill()
        await trio.sleep(0.1)
        assert alice.adverts.holders_with_self(ONE.block) == []


@virtual_time_test
async def test_a_silent_nodes_adverts_are_gone_within_thirty_seconds() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    bob.shelf.put(ONE)
    async with running(alice, bob):
        await trio.sleep(1)
        fabric.weather = Weather(loss=1.0)
        await trio.sleep(10)
        assert alice.adverts.holders(ONE.block) == [bob.id]
        await trio.sleep(20)
        assert alice.adverts.holders_with_self(ONE.block) == []


@virtual_time_test
async def test_another_profile_does_not_compute_for_us() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob", profile="cuda")
    bob.shelf.put(ONE)
    async with running(alice, bob):
        await trio.sleep(1)
        assert alice.adverts.holders(ONE.block) == []
        assert alice.adverts.holders_with_self(ONE.block) == [bob.id]


@virtual_time_test
async def test_held_models_are_provided_and_found_in_the_dht() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    bob.shelf.put(ONE)
    async with running(alice, bob):
        await trio.sleep(1)
        assert list(fabric.provided[MODEL]) == [bob.id]
        alice.adverts.directory.remove(bob.id)
        await alice.adverts.search(MODEL)
        assert alice.adverts.holders(ONE.block) == [bob.id]
        bob.shelf.put()
        await trio.sleep(1)
        assert list(fabric.provided[MODEL]) == []


@virtual_time_test
async def test_nobody_can_give_the_advert_of_another() -> None:
    fabric = Fabric(1)
    alice, bob, carol = (make(fabric, name) for name in ("alice", "bob", "carol"))
    bob.shelf.put(ONE)
    async with running(alice, bob, carol):
        await trio.sleep(1)
        reply: AdvertReply = await carol.network.request(bob.id, PROTOCOL, AdvertRequest())
        stolen = SignedAdvert.decode(reply.advert, net=NETWORK)
        assert stolen.advert.peer == bob.id

        async def lie(peer: PeerId, message: object) -> AdvertReply:
            return reply

        messages, _ = carol.network.calls.handlers[PROTOCOL]
        carol.network.calls.handlers[PROTOCOL] = (messages, lie)
        before = alice.network.counters.penalties
        await alice.adverts._ask(carol.id)
        assert alice.network.counters.penalties == before + 1


@virtual_time_test
async def test_broken_gossip_costs_its_sender_and_is_not_spread() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    async with running(alice, bob):
        await bob.network.publish("adverts", b"no advert")
        await trio.sleep(1)
        assert alice.network.counters.gossip_refused == 1
        assert alice.network.counters.penalties == 1


@virtual_time_test
async def test_what_an_advert_cannot_say_is_left_out() -> None:
    fabric = Fabric(1)
    alice, bob = make(fabric, "alice"), make(fabric, "bob")
    many = [HeldExpert(MODEL, n % 1000, n // 1000, BlockId(cid(b"%d" % n))) for n in range(20_000)]
    async with running(alice, bob):
        bob.shelf.put(*many)
        await trio.sleep(2)
        told = {held for held, _ in alice.adverts.directory.experts()}
        assert 10_000 < len(told) < 20_000
        assert told <= set(many)
