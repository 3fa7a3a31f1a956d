"""The in-process twin keeps the promises of the network's interface."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import msgspec
import pytest
import trio
import trio.testing

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import PeerDown, PeerNetwork, PeerUp
from blyan_node.testing.network import Fabric, TwinNetwork, Weather
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import PeerId
from protocols.signing import Identity
from protocols.wire import Messages

ECHO = "/blyan/echo/1"
MESSAGES = Messages(ECHO)


class Text(msgspec.Struct, frozen=True):
    text: str


MESSAGES.register(1, Text, bytes_max=1024)


async def echo(peer: PeerId, message: Text) -> Text:
    if message.text == "refuse":
        raise Refused(ErrorCode.BUSY, "busy", "a test", data={"queue": 3})
    if message.text == "malformed":
        raise RemoteProtocolError("echo", "a test")
    if message.text == "hang":
        await trio.sleep_forever()
    return Text(message.text.upper())


def nodes_of(fabric: Fabric, n: int) -> list[TwinNetwork]:
    nodes = [fabric.node(Identity.from_seed(bytes([i + 1]) * 32)) for i in range(n)]
    for node in nodes:
        node.handle(ECHO, MESSAGES, echo)
    return nodes


@asynccontextmanager
async def running(*nodes: TwinNetwork) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.run)
        yield nursery
        nursery.cancel_scope.cancel()


def accept(peer: PeerId, data: bytes) -> None:
    if data == b"bad":
        raise RemoteProtocolError("test", "bad")


@trio_test
async def test_request_and_its_failures() -> None:
    alice, bob = nodes_of(Fabric(), 2)
    as_interface: PeerNetwork = alice
    async with running(alice, bob):
        assert await as_interface.request(bob.peer_id, ECHO, Text("hi")) == Text("HI")
        with pytest.raises(PeerRefused, match="busy") as refused:
            await alice.request(bob.peer_id, ECHO, Text("refuse"))
        assert refused.value.refused.data == {"queue": 3}
        with pytest.raises(PeerRefused, match="malformed"):
            await alice.request(bob.peer_id, ECHO, Text("malformed"))
        with pytest.raises(RequestTimeout):
            await alice.request(bob.peer_id, ECHO, Text("hang"), timeout_s=0.01)
        async with trio.open_nursery() as nursery:

            async def asks() -> None:
                with pytest.raises(PeerGone, match="cut"):
                    await alice.request(bob.peer_id, ECHO, Text("hang"))

            nursery.start_soon(asks)
            await trio.testing.wait_all_tasks_blocked()
            bob.kill()
        with pytest.raises(PeerGone, match="not connected"):
            await alice.request(bob.peer_id, ECHO, Text("hi"))


@trio_test
async def test_gossip_reaches_all_once_and_bad_messages_none() -> None:
    fabric = Fabric()
    nodes = nodes_of(fabric, 4)
    inboxes = [node.subscribe("blocks", accept, 2) for node in nodes]
    async with running(*nodes):
        await nodes[0].publish("blocks", b"one")
        await trio.testing.wait_all_tasks_blocked()
        assert [inbox.statistics().current_buffer_used for inbox in inboxes] == [0, 1, 1, 1]
        await nodes[0].publish("blocks", b"bad")
        for i in range(2, 5):
            await nodes[0].publish("blocks", b"%d" % i)
            await trio.testing.wait_all_tasks_blocked()
        assert [(await inboxes[1].receive())[1] for _ in range(2)] == [b"3", b"4"]
        assert nodes[1].counters.gossip_dropped == 2
        assert nodes[1].counters.gossip_refused == 1


@trio_test
async def test_partition_heals_and_bans_do_not() -> None:
    fabric = Fabric()
    alice, bob, carol = nodes_of(fabric, 3)
    events = alice.peer_events()
    async with running(alice, bob, carol):
        fabric.partition([alice], [bob, carol])
        assert not alice.peers and set(bob.peers) == {carol.peer_id}
        fabric.heal()
        assert set(alice.peers) == {bob.peer_id, carol.peer_id}
        kinds = [type(events.receive_nowait()) for _ in range(6)]
        assert kinds == [PeerUp, PeerUp, PeerDown, PeerDown, PeerUp, PeerUp]
        for _ in range(5):
            alice.penalise(bob.peer_id, RemoteProtocolError("test", "garbage"))
        assert set(alice.peers) == {carol.peer_id}


def test_the_same_seed_gives_the_same_run() -> None:
    async def story(seed: int) -> list[str]:
        fabric = Fabric(seed, Weather((0.01, 0.4), loss=0.3))
        alice, bob = nodes_of(fabric, 2)
        said: list[str] = []
        async with running(alice, bob):
            for i in count():
                if len(said) == 12:
                    break
                try:
                    await alice.request(bob.peer_id, ECHO, Text(str(i)), timeout_s=0.6)
                    said.append(f"{trio.current_time():.9f}")
                except RequestTimeout:
                    said.append("late")
        return said

    def run(seed: int) -> list[str]:
        return trio.run(story, seed, clock=trio.testing.MockClock(autojump_threshold=0))

    first = run(1)
    assert "late" in first and len(set(first)) > 3
    assert [t == "late" for t in run(1)] == [t == "late" for t in first]
    assert [t == "late" for t in run(2)] != [t == "late" for t in first]


@trio_test
async def test_providers_are_those_that_can_be_reached() -> None:
    fabric = Fabric()
    alice, bob, carol = nodes_of(fabric, 3)
    async with running(alice, bob, carol):
        await bob.provide(b"key")
        await carol.provide(b"key")
        assert await alice.find_providers(b"key") == [bob.peer_id, carol.peer_id]
        bob.withdraw(b"key")
        carol.kill()
        await trio.testing.wait_all_tasks_blocked()
        assert await alice.find_providers(b"key") == []
