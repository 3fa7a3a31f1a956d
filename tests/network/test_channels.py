"""The two ends of a channel over a pipe in memory: what a hostile or slow other end can do."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import trio
import trio.testing

from blyan_node.network.channels import AnsweringChannel, AskingChannel, Served, StreamEnded
from blyan_node.network.interface import Counters
from blyan_node.testing.trio_tests import trio_test
from protocols.channel.frames import HEADER, FrameKind
from protocols.ids import PeerId
from protocols.limits import (
    MIB,
    channel_unsent_bytes_max,
    handlers_per_peer_max,
    in_flight_requests_max,
)
from protocols.signing import Identity
from protocols.wire import Messages

BOB = Identity.from_seed(bytes([2]) * 32).peer_id
MESSAGES = Messages("/blyan/test/1")


class Text(msgspec.Struct, frozen=True):
    text: str


MESSAGES.register(1, Text, bytes_max=4 * MIB)


class Pipe:
    """What a channel uses of a libp2p stream, over one end of a memory stream."""

    def __init__(self, end: trio.StapledStream[Any, Any]) -> None:
        self.end = end

    async def read(self, size: int) -> bytes:
        return bytes(await self.end.receive_some(size))

    async def write(self, data: bytes) -> None:
        await self.end.send_all(data)

    async def reset(self) -> None:
        await self.end.aclose()


def request(number: int, text: str) -> bytes:
    data = MESSAGES.encode(Text(text))
    return HEADER.pack(FrameKind.REQUEST, number, len(data), len(data)) + data


def cancel(number: int) -> bytes:
    return HEADER.pack(FrameKind.CANCEL, number, 0, 0)


@asynccontextmanager
async def answering(
    handler: Callable[[PeerId, Any], Awaitable[object]],
) -> AsyncIterator[trio.SocketStream]:
    """A channel that answers with `handler`, and the other end of its stream: a real socket."""
    blamed: list[Exception] = []
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener, trio.open_nursery() as nursery:
        port = listener.socket.getsockname()[1]
        ours = await trio.open_tcp_stream("127.0.0.1", port)
        theirs = await listener.accept()
        channel = AnsweringChannel(
            BOB,
            cast(Any, Pipe(cast(Any, ours))),
            Counters(),
            Served(MESSAGES, handler),
            trio.CapacityLimiter(handlers_per_peer_max),
            lambda peer, error: blamed.append(error),
        )
        nursery.start_soon(channel.run)
        yield theirs
        await theirs.aclose()
        nursery.cancel_scope.cancel()
    assert not blamed


@trio_test
async def test_a_cancel_that_comes_with_its_request_is_heard() -> None:
    ran = 0

    async def handler(peer: PeerId, message: Text) -> Text:
        nonlocal ran
        ran += 1
        return cast(Text, await trio.sleep_forever())

    async with answering(handler) as stream:
        for number in range(1, 500):  # each pair in one piece
            await stream.send_all(request(number, "x") + cancel(number))
            answer = await stream.receive_some(10_000)
            assert answer and answer[0] == FrameKind.REFUSAL
    assert ran == 0


@trio_test
async def test_a_slow_reader_does_not_have_us_collect_replies() -> None:
    served = 0

    async def handler(peer: PeerId, message: Text) -> Text:
        nonlocal served
        served += 1
        return Text("x" * (3 * MIB))

    async with answering(handler) as stream:
        for number in range(1, in_flight_requests_max + 1):
            await stream.send_all(request(number, "x"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert served < (channel_unsent_bytes_max + 16 * MIB) // (3 * MIB)
        left = in_flight_requests_max * (3 * MIB)
        while left > 0:  # who reads gets everything
            left -= len(await stream.receive_some(1 << 20))
    assert served == in_flight_requests_max


@asynccontextmanager
async def asking() -> AsyncIterator[tuple[AskingChannel, trio.StapledStream[Any, Any]]]:
    ours, theirs = trio.testing.memory_stream_pair()
    channel = AskingChannel(cast(Any, Pipe(ours)), Counters())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(channel.run)
        yield channel, theirs
        await theirs.aclose()


async def fill(channel: AskingChannel, nursery: trio.Nursery, extra: int) -> list[str]:
    """As many requests as may be in flight, and `extra` that wait for room; how they ended."""
    ended: list[str] = []

    async def ask() -> None:
        try:
            ended.append((await channel.ask(b"x")).decode())
        except StreamEnded as error:
            ended.append(str(error))

    for _ in range(in_flight_requests_max + extra):
        nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    return ended


@trio_test
async def test_all_who_wait_for_room_get_it_or_hear_of_the_end() -> None:
    reply = HEADER.pack(FrameKind.REPLY, 1, 2, 2) + b"ok"
    async with trio.open_nursery() as nursery, asking() as (channel, peer):
        ended = await fill(channel, nursery, 3)
        for number in (1, 2, 3):
            await peer.send_all(reply[:1] + number.to_bytes(4, "big") + reply[5:])
        await trio.testing.wait_all_tasks_blocked()
        assert ended == ["ok"] * 3
        late = await fill(channel, nursery, 3 - in_flight_requests_max)
        await peer.aclose()
        with trio.fail_after(1):
            while len(ended) + len(late) < in_flight_requests_max + 3 + 3:
                await trio.testing.wait_all_tasks_blocked()
    assert set(ended[3:] + late) == {"closed"}


@trio_test
async def test_room_that_a_cancelled_request_leaves_is_used() -> None:
    async with trio.open_nursery() as nursery, asking() as (channel, peer):
        await trio.testing.wait_all_tasks_blocked()
        channel._wire.wake = lambda: None  # type: ignore[method-assign]  # so that nothing leaves
        scope = trio.CancelScope()

        async def gives_up() -> None:
            with scope:
                await channel.ask(b"x")

        nursery.start_soon(gives_up)
        await trio.testing.wait_all_tasks_blocked()
        await fill(channel, nursery, 0)
        assert len(channel._waiters) == in_flight_requests_max
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert len(channel._waiters) == in_flight_requests_max
        await peer.aclose()


@trio_test
async def test_a_peer_that_breaks_the_framing_is_blamed_once_by_the_channel() -> None:
    async with trio.open_nursery() as nursery, asking() as (channel, peer):
        ended = await fill(channel, nursery, 0)
        await peer.send_all(b"\xff" * 100)
        await trio.testing.wait_all_tasks_blocked()
        assert len(ended) == in_flight_requests_max
        assert all("frame kind" in why for why in ended)
        assert channel.error is not None
