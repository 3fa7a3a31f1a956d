"""Names in addresses are looked up as the system does, and each of their addresses is tried."""

import socket

import pytest
import trio

from blyan_node.network.interface import NetworkConfig, PeerUp
from blyan_node.network.names import resolved
from blyan_node.network.network import Network
from blyan_node.testing.trio_tests import trio_test
from protocols.hello import HelloSummary
from protocols.ids import NetworkId, cid
from protocols.signing import Identity

KNOWN = {
    ("bootstrap", socket.AF_INET): ["192.0.2.7", "192.0.2.8"],
    ("bootstrap", socket.AF_INET6): ["2001:db8::7"],
    ("half.dead", socket.AF_INET): ["127.0.0.2", "127.0.0.1"],
}


class Book(trio.abc.HostnameResolver):
    """What the hosts file would say."""

    async def getaddrinfo(  # type: ignore[override]
        self, host: bytes, port: object, family: int = 0, type: int = 0, *_: object
    ) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        found = [
            (kind, type, 6, "", (address, 0))
            for (name, kind), addresses in KNOWN.items()
            for address in addresses
            if name == host.decode() and family in (kind, socket.AF_UNSPEC)
        ]
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found

    async def getnameinfo(self, sockaddr: object, flags: int) -> tuple[str, str]:
        raise NotImplementedError


@trio_test
async def test_a_name_becomes_each_of_its_addresses() -> None:
    trio.socket.set_custom_hostname_resolver(Book())
    v4, v6 = ["/ip4/192.0.2.7/tcp/1", "/ip4/192.0.2.8/tcp/1"], ["/ip6/2001:db8::7/tcp/1"]
    assert await resolved("/dns4/bootstrap/tcp/1") == v4
    assert await resolved("/dns6/bootstrap/tcp/1") == v6
    assert await resolved("/dns/bootstrap/tcp/1") == v4 + v6
    assert await resolved("/ip4/192.0.2.9/tcp/1") == ["/ip4/192.0.2.9/tcp/1"]
    with pytest.raises(OSError, match="not known"):
        await resolved("/dns4/nobody/tcp/1")


def _node(number: int, *bootstrap: str) -> Network:
    config = NetworkConfig(
        network_id=NetworkId(cid(b"names")),
        network_name="names",
        role="main",
        version="0.1.0",
        profile="test",
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=bootstrap,
        seed=number,
    )
    summary = HelloSummary(log_id=bytes([number]) * 16, log_length=number)
    return Network(Identity.from_seed(bytes([number]) * 32), config, lambda: summary)


@trio_test
async def test_a_name_is_dialled_at_the_address_that_answers() -> None:
    trio.socket.set_custom_hostname_resolver(Book())
    alice = _node(1)
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        bob = _node(2, alice.addrs[0].replace("/ip4/127.0.0.1/", "/dns4/half.dead/"))
        events = bob.peer_events()
        await nursery.start(bob.run)
        event = await events.receive()
        assert isinstance(event, PeerUp) and event.peer.peer_id == alice.peer_id
        nursery.cancel_scope.cancel()
