"""How a node looks from outside: dialled at its own host and nowhere else, and told the time."""

import time
from dataclasses import replace

import msgspec
import pytest
import trio

from blyan_node.network.errors import PeerRefused
from blyan_node.network.interface import NetworkConfig
from blyan_node.network.network import Network
from blyan_node.testing.echo_node import MESSAGES, NETWORK, PROTOCOL, echo
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, RemoteProtocolError
from protocols.limits import reach_addrs_max
from protocols.reach import Look, Seen, Tried, check_look, check_seen
from protocols.signing import Identity

CONFIG = NetworkConfig(
    NETWORK, "echo", role="gpu", version="test", profile="test", listen=("/ip4/127.0.0.1/tcp/0",)
)
CLOSED = "/ip4/127.0.0.1/tcp/9"


def build(seed: int, **options: object) -> Network:
    config = replace(CONFIG, seed=seed, **options)  # type: ignore[arg-type]
    network = Network(Identity.from_seed(bytes([seed]) * 32), config)
    network.handle(PROTOCOL, MESSAGES, echo)
    return network


@pytest.mark.parametrize("psk", [None, bytes(32)])
def test_a_node_is_dialled_back_and_told_the_time(psk: bytes | None) -> None:
    @trio_test
    async def story() -> None:
        alice, bob = build(1, psk=psk), build(2, psk=psk)
        async with trio.open_nursery() as nursery:
            await nursery.start(alice.run)
            await nursery.start(bob.run)
            peer = await bob.connect(alice.addrs[0])
            listening = bob.addrs[0].rpartition("/p2p/")[0]
            seen = await bob.reach.look(peer, [*bob.addrs, CLOSED, "/ip4/192.0.2.1/tcp/4040"])
            assert seen.host == "127.0.0.1" and seen.peer == alice.peer_id
            assert {tried.addr: tried.why for tried in seen.tried} == {
                listening: "",
                CLOSED: "connection refused",
            }
            assert abs(seen.offset_ms) <= seen.error_ms
            assert list(alice.peers) == [bob.peer_id]
            with pytest.raises(PeerRefused) as refused:
                await bob.reach.look(peer, [])
            assert refused.value.refused.code is ErrorCode.BUSY
            nursery.cancel_scope.cancel()

    story()


@trio_test
async def test_who_names_no_address_of_its_own_is_tried_at_its_host() -> None:
    alice, bob, carol = build(1), build(2), build(3)
    async with trio.open_nursery() as nursery:
        for node in (alice, bob, carol):
            await nursery.start(node.run)
        peer = await bob.connect(alice.addrs[0])
        port = carol.addrs[0].split("/")[4]
        seen = await bob.reach.look(peer, [f"/ip4/192.0.2.1/tcp/{port}"])
        (tried,) = seen.tried
        assert tried.addr == f"/ip4/127.0.0.1/tcp/{port}"
        assert tried.why == "a node with another peer id answers there"
        nursery.cancel_scope.cancel()


@trio_test
async def test_the_clock_of_a_peer_is_read_off() -> None:
    alice, bob = build(1), build(2)
    alice.reach.clock_ms = lambda: bob.reach.clock_ms() + 600_000
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        await nursery.start(bob.run)
        peer = await bob.connect(alice.addrs[0])
        seen = await bob.reach.look(peer, [])
        assert abs(seen.offset_ms - 600_000) <= seen.error_ms
        nursery.cancel_scope.cancel()


def test_what_is_too_much_is_refused() -> None:
    check_look(Look(addrs=[CLOSED] * reach_addrs_max))
    for addrs in ([CLOSED] * (reach_addrs_max + 1), ["/" * 200]):
        with pytest.raises(RemoteProtocolError, match="reach"):
            check_look(Look(addrs=addrs))
    good = Seen(host="127.0.0.1", time_ms=int(1000 * time.time()), tried=[])
    check_seen(good)
    bad = Tried(addr="a", why="\x1b[2J")
    for seen in (
        msgspec.structs.replace(good, tried=[bad]),
        msgspec.structs.replace(good, time_ms=-1),
        msgspec.structs.replace(good, host="\n"),
    ):
        with pytest.raises(RemoteProtocolError, match="reach"):
            check_seen(seen)
