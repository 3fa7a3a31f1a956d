"""What others say of addresses does not have us knock at doors that are none of theirs."""

import random
import socket
from typing import Any, cast

import msgspec
import trio
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from blyan_node.network.addressbook import AddressBook
from blyan_node.network.dialer import Dialer
from blyan_node.testing.echo_node import build
from blyan_node.testing.trio_tests import trio_test
from protocols.hello import KnownPeer
from protocols.ids import PeerId, cid
from protocols.signing import Identity

NOBODY = Identity.from_seed(bytes([9]) * 32).peer_id


@trio_test
async def test_a_lookup_dials_nobody_whom_an_answer_names() -> None:
    """Mallory's answers name a peer at a port of alice's own machine, which is a service there."""
    service = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = service.socket.getsockname()[1]
    alice, mallory = build(1), build(2)
    knocked = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        knocked.set()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [service])
        for node in (alice, mallory):
            await nursery.start(node.run)
        await mallory.connect(alice.addrs[0])
        addr = Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")
        dht = mallory._providers._dht
        mallory._swarm.peerstore.add_addrs(ID.from_base58(NOBODY), [addr], 3600)
        told = PeerInfo(ID.from_base58(NOBODY), [addr])
        assert await dht.routing_table.add_peer(told, skip_server_mode_check=True)
        asked = alice._providers._dht.peer_routing
        with trio.fail_after(15):
            while not asked.routing_table.get_peer_ids():
                await trio.sleep(0.05)
            named = await asked.find_closest_peers_network(cid(b"model")[2:])
        assert ID.from_base58(NOBODY) in named
        assert await alice.find_providers(cid(b"model")) == []
        assert not knocked.is_set()
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_peer_elsewhere_tells_no_addresses_of_this_machine() -> None:
    alice, mallory = build(1), build(2)
    async with trio.open_nursery() as nursery:
        for node in (alice, mallory):
            await nursery.start(node.run)
        await mallory.connect(alice.addrs[0])
        alice._swarm.host_of = lambda peer_id: "198.51.100.7"  # type: ignore[method-assign]
        at = ["/ip4/127.0.0.1/tcp/22", "/ip4/169.254.169.254/tcp/80", "/ip4/192.0.2.7/tcp/4040"]
        lie = KnownPeer(peer_id=NOBODY, addrs=at)
        hello = msgspec.structs.replace(mallory._greeting.ours(), addrs=at, peers=[lie])
        alice._greeting._take(mallory.peer_id, hello)
        assert alice._book.addrs(NOBODY) == alice._book.addrs(mallory.peer_id) == at[2:]
        nursery.cancel_scope.cancel()


class Resolver(trio.abc.HostnameResolver):
    """Mallory's name server: every name leads to this machine, some elsewhere as well."""

    async def getaddrinfo(  # type: ignore[override]
        self, host: bytes, *_: object
    ) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        found = ["127.0.0.1", "192.0.2.7"] if host == b"both" else ["127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 0)) for one in found]

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        raise NotImplementedError


class Swarm:
    """Remembers what was dialled."""

    def __init__(self) -> None:
        self.dialled: list[str] = []

    async def dial_addr(self, addr: Multiaddr, _: ID) -> None:
        self.dialled.append(str(addr))
        raise OSError("nobody is there")


@trio_test
async def test_a_name_that_a_peer_tells_leads_to_no_service_of_this_machine() -> None:
    trio.socket.set_custom_hostname_resolver(Resolver())

    async def no_detour(_: PeerId) -> str | None:
        return "no peer that could relay"

    swarm, book = Swarm(), AddressBook(NOBODY, random.Random(1))
    dialer = Dialer(cast(Any, swarm), book, list, lambda _: True, no_detour)
    peer = Identity.from_seed(bytes([8]) * 32).peer_id
    book.learn(peer, ["/dns4/mine/tcp/22", "/dns4/both/tcp/22"], 0.0)
    await dialer.dial(peer)
    assert swarm.dialled == ["/ip4/192.0.2.7/tcp/22"]
    book.add_bootstrap(peer, "/dns4/mine/tcp/4040")  # a person may: it is their machine
    await dialer.dial(peer)
    assert swarm.dialled[1] == "/ip4/127.0.0.1/tcp/4040"
