"""The port that Prometheus reads: what it answers, and what it lets nobody do to the node."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from random import Random

import pytest
import trio
from trio.testing import MockClock

from blyan_node.metrics.address import MetricsAddress, parse_metrics_address
from blyan_node.metrics.port import TEXT, MetricsPort, Page, respond
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import Refused, RemoteProtocolError

Connect = Callable[[], Awaitable[trio.SocketStream]]
HERE = MetricsAddress("127.0.0.1", 0)
GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


class Numbers:
    """Two pages, and how often they were made."""

    def __init__(self, size: int = 10) -> None:
        self.made = 0
        self._size = size

    def pages(self) -> dict[str, Page]:
        return {"/metrics": Page(TEXT, self._make), "/health": Page(TEXT, lambda: b"ok\n")}

    def _make(self) -> bytes:
        self.made += 1
        return b"x" * self._size


@asynccontextmanager
async def served(numbers: Numbers) -> AsyncIterator[Connect]:
    """A function that connects to a port with these pages."""
    port = MetricsPort(HERE)
    async with trio.open_nursery() as nursery:
        await nursery.start(port.run, numbers.pages())
        assert port.url is not None
        number = int(port.url.split(":")[2].split("/")[0])
        yield lambda: trio.open_tcp_stream("127.0.0.1", number)
        nursery.cancel_scope.cancel()


async def _all(stream: trio.SocketStream) -> bytes:
    got = b""
    with suppress(trio.BrokenResourceError):
        while data := await stream.receive_some(65536):
            got += data
    return got


async def _ask(connect: Connect, request: bytes) -> bytes:
    stream = await connect()
    async with stream:
        with suppress(trio.BrokenResourceError):
            await stream.send_all(request)
        return await _all(stream)


@trio_test
async def test_it_shows_the_metrics_and_the_health_and_closes() -> None:
    numbers = Numbers()
    async with served(numbers) as connect:
        answer = await _ask(connect, GET)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"Content-Length: 10" in head and b"Connection: close" in head
        assert body == b"x" * 10
        assert (await _ask(connect, b"GET /health?a=b HTTP/1.0\n\n")).endswith(b"ok\n")
    assert numbers.made == 1


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"POST /metrics HTTP/1.1", 405),
        (b"HEAD /metrics HTTP/1.1", 405),
        (b"GET /secrets HTTP/1.1", 404),
        (b"GET /metrics/../identity.key HTTP/1.1", 404),
        (b"GET http://other/metrics HTTP/1.1", 404),
        (b"GET /metrics HTTP/2.0", 505),
        (b"GET /metrics", 400),
        (b"GET  /metrics HTTP/1.1", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"", 400),
    ],
)
def test_anything_else_is_answered_with_its_number(request_line: bytes, status: int) -> None:
    numbers = Numbers()
    answer = respond(request_line + b"\r\n\r\n", numbers.pages())
    assert answer.startswith(f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n".encode())
    assert numbers.made == 0


def test_ten_thousand_requests_of_garbage_are_answered_and_read_nothing() -> None:
    numbers, random = Numbers(), Random(6)
    for _ in range(10_000):
        noise = random.randbytes(random.randrange(30))
        words = (
            random.choice([b"GET", b"get", b"", noise[:9]]),
            random.choice([b"/Metrics", b"metrics", noise]),
            random.choice([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9", noise[-4:]]),
        )
        head = random.choice([b" ", b"\t", b"  ", b"\x00"]).join(words) + b"\r\n\r\n"
        answer = respond(head, numbers.pages())
        status = int(answer.split(b" ")[1])
        assert status in (400, 404, 405, 505), head
    assert numbers.made == 0


@trio_test
async def test_a_request_that_is_too_long_is_turned_away() -> None:
    numbers = Numbers()
    async with served(numbers) as connect:
        long = b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * limits.metrics_request_bytes_max
        assert (await _ask(connect, long)).startswith(b"HTTP/1.1 431 ")
        assert (await _ask(connect, GET)).startswith(b"HTTP/1.1 200 ")
    assert numbers.made == 1


@trio_test
async def test_those_who_say_nothing_cannot_take_the_places() -> None:
    numbers = Numbers()
    async with served(numbers) as connect:
        silent = [await connect() for _ in range(limits.metrics_connections_max)]
        half = await connect()
        await half.send_all(b"GET /met")
        assert (await _ask(connect, GET)).startswith(b"HTTP/1.1 200 ")
        assert await _all(silent[0]) == b"", "the one that waited longest was closed"
        for stream in (*silent, half):
            await trio.aclose_forcefully(stream)
        assert (await _ask(connect, GET)).startswith(b"HTTP/1.1 200 ")


@trio_test
async def test_a_scraper_that_takes_nothing_holds_up_nobody() -> None:
    numbers = Numbers(size=64 << 20)  # more than any socket buffers
    async with served(numbers) as connect:
        slow = await connect()
        await slow.send_all(GET)
        assert (await slow.receive_some(8)) == b"HTTP/1.1"
        assert (await _ask(connect, b"GET /health HTTP/1.1\r\n\r\n")).endswith(b"ok\n")
        await trio.aclose_forcefully(slow)


def test_half_a_request_ends_by_the_clock() -> None:
    """On a clock that jumps as soon as nothing happens: nobody waits in this test."""

    async def main() -> None:
        async with served(Numbers()) as connect, await connect() as stream:
            await stream.send_all(b"GET /metrics HTTP/1.1\r\n")
            assert (await _all(stream)).startswith(b"HTTP/1.1 408 ")

    trio.run(main, clock=MockClock(autojump_threshold=0.2))


@trio_test
async def test_a_taken_port_is_said() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        with pytest.raises(Refused) as caught:
            await MetricsPort(MetricsAddress("127.0.0.1", port)).run({})
    assert f"127.0.0.1:{port}" in caught.value.what and "--metrics" in caught.value.next


def test_an_address_is_of_this_machine_or_says_that_it_is_public() -> None:
    assert parse_metrics_address("127.0.0.1:9464") == MetricsAddress("127.0.0.1", 9464)
    assert parse_metrics_address("[::1]:0") == MetricsAddress("::1", 0)
    assert parse_metrics_address("public:0.0.0.0:9464") == MetricsAddress("0.0.0.0", 9464)
    with pytest.raises(RemoteProtocolError, match=r"public:0\.0\.0\.0:9464"):
        parse_metrics_address("0.0.0.0:9464")
    for bad in ("9464", "localhost:9464", "127.0.0.1", "127.0.0.1:70000", "1.2.3.400:1", "", ":1",
                "[127.0.0.1]:x", "public:", "127.0.0.1:9464/metrics"):  # fmt: skip
        with pytest.raises(RemoteProtocolError, match="address"):
            parse_metrics_address(bad)


@trio_test
async def test_a_page_that_cannot_be_made_ends_nothing() -> None:
    def fail() -> bytes:
        raise KeyError("numbers")

    numbers = Numbers()
    numbers.pages = lambda: {"/metrics": Page(TEXT, fail), "/health": Page(TEXT, lambda: b"ok")}  # type: ignore[method-assign]
    async with served(numbers) as connect:
        assert (await _ask(connect, GET)).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
        assert (await _ask(connect, b"GET /health HTTP/1.1\r\n\r\n")).endswith(b"ok")
