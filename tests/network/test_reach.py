"""How a node looks from outside: dialled at its own host and nowhere else, and told the time."""

import socket
import time
from dataclasses import replace
from typing import NoReturn

import msgspec
import pytest
import trio
from hypothesis import example, given
from hypothesis import strategies as st

from blyan_node.network.errors import PeerRefused
from blyan_node.network.interface import NetworkConfig
from blyan_node.network.listening import check_free
from blyan_node.network.network import Network
from blyan_node.network.reach import _at_host, offset_of
from blyan_node.testing.echo_node import MESSAGES, NETWORK, PROTOCOL, echo
from blyan_node.testing.trio_tests import trio_test
from blyan_node.testing.virtual_time import virtual_time_test
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.limits import reach_addrs_max, reach_dial_s_max, reach_per_host_max
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
async def test_a_node_is_dialled_back_over_ipv6_as_well() -> None:
    if not has_ipv6():
        pytest.skip("this machine has no ::1")
    alice, bob = (build(seed, listen=("/ip6/::1/tcp/0",)) for seed in (1, 2))
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        await nursery.start(bob.run)
        seen = await bob.reach.look(await bob.connect(alice.addrs[0]), bob.addrs)
        listening = bob.addrs[0].rpartition("/p2p/")[0]
        assert (seen.host, seen.tried) == ("::1", (Tried(addr=listening, why=""),))
        nursery.cancel_scope.cancel()


def test_ipv4_on_the_same_port_is_no_obstacle() -> None:
    if not has_ipv6():
        pytest.skip("this machine has no ::1")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        check_free(f"/ip6/::1/tcp/{port}")
        check_free(f"/ip6/::/tcp/{port}")
        with pytest.raises(Refused, match="cannot listen"):
            check_free(f"/ip4/127.0.0.1/tcp/{port}")


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


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
async def test_many_peers_at_one_host_have_its_ports_tried_no_faster() -> None:
    alice, *others = (build(seed) for seed in range(1, reach_per_host_max + 3))
    async with trio.open_nursery() as nursery:
        for node in (alice, *others):
            await nursery.start(node.run)
        for node in others[:-1]:
            await node.reach.look(await node.connect(alice.addrs[0]), [CLOSED])
        last = others[-1]
        await last.connect(alice.addrs[0])
        with pytest.raises(PeerRefused) as refused:
            await last.reach.look(alice.peer_id, [CLOSED])
        assert refused.value.refused.code is ErrorCode.BUSY
        alice._swarm.host_of = lambda peer_id: "192.0.2.7"  # type: ignore[method-assign]
        await last.reach.look(alice.peer_id, [])
        nursery.cancel_scope.cancel()


class SlowNames(trio.abc.HostnameResolver):
    """A name server of somebody who wants us to wait."""

    async def getaddrinfo(self, *_: object) -> NoReturn:
        await trio.sleep_forever()

    async def getnameinfo(self, sockaddr: object, flags: int) -> NoReturn:
        raise NotImplementedError


@virtual_time_test
async def test_a_name_that_nobody_answers_for_keeps_no_place() -> None:
    trio.socket.set_custom_hostname_resolver(SlowNames())
    began = trio.current_time()
    names = [f"/dns4/slow{n}.example/tcp/1" for n in range(reach_addrs_max)]
    assert await _at_host(names, "192.0.2.7") == ["/ip4/192.0.2.7/tcp/1"]
    assert trio.current_time() - began <= reach_dial_s_max


@trio_test
async def test_who_listens_on_ipv4_alone_is_not_tried_over_ipv6() -> None:
    assert await _at_host([CLOSED], "2001:db8::7") == []
    six = "/ip6/2001:db8::9/tcp/7"
    assert await _at_host([CLOSED, six], "2001:db8::7") == ["/ip6/2001:db8::7/tcp/7"]


@given(
    offset=st.integers(-(10**6), 10**6),
    began_us=st.integers(0, 10_000),
    took_us=st.integers(0, 10_000),
    until_read=st.floats(0, 1),
)
@example(offset=600_000, began_us=900, took_us=3_999, until_read=1.0)
def test_a_clock_is_read_off_within_the_error(
    offset: int, began_us: int, took_us: int, until_read: float
) -> None:
    theirs_us = began_us + int(until_read * took_us) + 1000 * offset
    found, error = offset_of(theirs_us // 1000, began_us // 1000, took_us / 1e6)
    assert abs(found - offset) <= error


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
    here = Tried(addr=CLOSED, why="connection refused")
    check_seen(msgspec.structs.replace(good, tried=[here] * reach_addrs_max))
    six = Tried(addr="/ip6/2001:db8::7/tcp/1", why="")
    check_seen(msgspec.structs.replace(good, host="2001:db8::7", tried=[six]))
    check_seen(msgspec.structs.replace(good, host=""))  # as over a relay
    for seen in (
        *(
            msgspec.structs.replace(good, tried=[tried])
            for tried in (
                Tried(addr=CLOSED, why="\x1b[2J"),
                Tried(addr=CLOSED, why="x" * 301),
                Tried(addr="/ip4/192.0.2.1/tcp/1", why=""),
                Tried(addr=f"{CLOSED}; call 555", why=""),
            )
        ),
        msgspec.structs.replace(good, tried=[here] * (reach_addrs_max + 1)),
        msgspec.structs.replace(good, time_ms=-1),
        msgspec.structs.replace(good, host="\n"),
        msgspec.structs.replace(good, host="192.0.2.7, so run this"),
        msgspec.structs.replace(good, host="fe80::1%so run this"),
        msgspec.structs.replace(good, host="", tried=[here]),
    ):
        with pytest.raises(RemoteProtocolError, match="reach"):
            check_seen(seen)
