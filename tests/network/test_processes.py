"""Nodes in processes of their own: SIGKILL, coming back, and a link that goes silent."""

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from blyan_node.network import greeting
from blyan_node.network.addressbook import Entry
from blyan_node.network.errors import PeerGone
from blyan_node.network.interface import PeerDown, PeerUp
from blyan_node.network.network import Network
from blyan_node.testing.echo_node import PROTOCOL, Echo, build
from blyan_node.testing.processes import echo_process, peer_of, wait_for
from blyan_node.testing.trio_tests import trio_test
from protocols.signing import Identity


@pytest.mark.slow
@trio_test
async def test_a_killed_process_fails_its_requests_at_once_and_its_successor_is_found() -> None:
    alice = build(1)
    events = alice.peer_events()
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        with echo_process(2, alice.addrs[0]) as (bob, addr):
            peer = peer_of(addr)
            with trio.fail_after(10):
                await wait_for(events, PeerUp, peer)
            assert len((await alice.request(peer, PROTOCOL, Echo(bytes(100_000)))).data) == 100_000
            gone = trio.Event()

            async def keeps_asking() -> None:
                with pytest.raises(PeerGone):
                    while True:
                        await alice.request(peer, PROTOCOL, Echo(bytes(2_000_000)))
                gone.set()

            nursery.start_soon(keeps_asking)
            await trio.sleep(0.3)
            bob.send_signal(signal.SIGKILL)
            with trio.fail_after(1):
                await gone.wait()
                await wait_for(events, PeerDown, peer)
            assert peer not in alice.peers
        with echo_process(2, alice.addrs[0]), trio.fail_after(15):
            await wait_for(events, PeerUp, peer)
            await alice.request(peer, PROTOCOL, Echo(b"again"))
        nursery.cancel_scope.cancel()


@pytest.mark.slow
@trio_test
async def test_one_bootstrap_address_finds_all_others() -> None:
    alice = build(1)
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        with echo_process(2, alice.addrs[0]) as (_, bob), echo_process(3, bob) as (_, carol):
            dave = build(4, (carol,))
            await nursery.start(dave.run)
            wanted = {alice.peer_id, peer_of(bob), peer_of(carol)}
            with trio.fail_after(20):
                while set(dave.peers) != wanted or len(alice.peers) != 3:
                    await trio.sleep(0.1)
        nursery.cancel_scope.cancel()


class Proxy:
    """A TCP link in front of a node, that can swallow everything without closing."""

    def __init__(self, port: int) -> None:
        self.silent = False
        self._port = port

    async def serve(self, incoming: trio.SocketStream) -> None:
        outgoing = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with incoming, outgoing, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, incoming, outgoing)
            nursery.start_soon(self._pump, outgoing, incoming)

    async def _pump(self, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        try:
            async for data in source:
                if not self.silent:
                    await sink.send_all(data)
            if not self.silent:
                await sink.aclose()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


@asynccontextmanager
async def behind_a_proxy(alice: Network) -> AsyncIterator[tuple[Proxy, str]]:
    proxy = Proxy(int(alice.addrs[0].split("/")[4]))
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, proxy.serve, [listener])
        yield proxy, f"/ip4/127.0.0.1/tcp/{port}/p2p/{alice.peer_id}"
        nursery.cancel_scope.cancel()


@pytest.mark.slow
@trio_test
async def test_a_silent_link_is_noticed_on_both_sides_and_comes_back() -> None:
    alice = build(1)
    events = {alice: alice.peer_events()}
    async with trio.open_nursery() as nursery:
        await nursery.start(alice.run)
        async with behind_a_proxy(alice) as (proxy, addr):
            bob = build(2, (addr,))
            events[bob] = bob.peer_events()
            await nursery.start(bob.run)
            both = ((alice, bob), (bob, alice))
            with trio.fail_after(10):
                for node, other in both:
                    await wait_for(events[node], PeerUp, other.peer_id)
            proxy.silent = True
            # as if the machines were apart: the one way to alice is the proxy, to bob there is none
            link = addr.rpartition("/p2p/")[0]
            bob._book._entries[alice.peer_id] = Entry(given=[link])
            alice._book._entries.clear()
            with trio.fail_after(30):
                for node, other in both:
                    await wait_for(events[node], PeerDown, other.peer_id)
            await trio.sleep(5)
            assert not alice.peers and not bob.peers
            proxy.silent = False
            with trio.fail_after(60):
                for node, other in both:
                    await wait_for(events[node], PeerUp, other.peer_id)
            await bob.request(alice.peer_id, PROTOCOL, Echo(b"back"))
        nursery.cancel_scope.cancel()


def test_the_processes_are_who_they_say() -> None:
    with echo_process(5) as (_, addr):
        assert peer_of(addr) == Identity.from_seed(bytes([5]) * 32).peer_id
        assert greeting.PROTOCOL == "/blyan/hello/1"
