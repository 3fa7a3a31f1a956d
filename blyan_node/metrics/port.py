"""The HTTP port that Prometheus reads: `GET /metrics` and `GET /health`, and nothing else.

Whoever connects may be slow, silent or no scraper at all. A connection has one request of
`metrics_request_bytes_max` within `metrics_request_s_max`, takes its answer within
`metrics_send_s_max`, and is closed; beyond `metrics_connections_max` the one that waits longest is
closed, so that those who say nothing cannot take all the places. The numbers are read for a request
that is whole and right, for no other.
"""

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from blyan_node.metrics.address import MetricsAddress
from protocols import limits
from protocols.errors import ErrorCode, Refused

log = logging.getLogger(__name__)

TEXT = "text/plain; charset=utf-8"
_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    505: "HTTP Version Not Supported",
}
_ENDS = (b"\r\n\r\n", b"\n\n")


@dataclass(frozen=True)
class Page:
    """What a path shows: its media type, and its content when it is asked for."""

    content_type: str
    content: Callable[[], bytes]


class MetricsPort:
    """Serves `pages` by path on `address`. `url` is known once it listens; None: no port."""

    def __init__(self, address: MetricsAddress | None) -> None:
        self.url: str | None = None
        self._address = address
        self._connections: dict[trio.SocketStream, trio.CancelScope] = {}

    async def run(
        self,
        pages: dict[str, Page],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves until cancelled; returns at once without an address. Raises `Refused`."""
        if self._address is None:
            task_status.started()
            return
        host = self._address.host
        (listener,) = await _listen(self._address)
        port = listener.socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"
        log.info("metrics on %s", self.url)

        async def serve(stream: trio.SocketStream) -> None:
            await self._serve(stream, pages)

        async with trio.open_nursery() as nursery:
            task_status.started()
            await trio.serve_listeners(serve, [listener], handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream, pages: dict[str, Page]) -> None:
        seconds = limits.metrics_request_s_max + limits.metrics_send_s_max
        if len(self._connections) >= limits.metrics_connections_max:
            self._connections.pop(next(iter(self._connections))).cancel()
        try:
            with trio.move_on_after(seconds) as self._connections[stream]:
                await _exchange(stream, pages)
        except trio.BrokenResourceError:
            pass  # it has left
        finally:
            self._connections.pop(stream, None)
            await trio.aclose_forcefully(stream)


async def _listen(address: MetricsAddress) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(address.port, host=address.host)
    except OSError as error:
        used = error.errno == errno.EADDRINUSE
        raise Refused(
            ErrorCode.CONFLICT if used else ErrorCode.BAD_INPUT,
            f"cannot show metrics on {address.host}:{address.port}",
            error.strerror or str(error),
            "give another address with --metrics; port 0 is any free one",
        ) from None


async def _exchange(stream: trio.SocketStream, pages: dict[str, Page]) -> None:
    """One request and its answer."""
    head: bytes | None = b""
    with trio.move_on_after(limits.metrics_request_s_max) as waiting:
        head = await _head(stream)
    if waiting.cancelled_caught:
        answer = _answer(408, f"no whole request within {limits.metrics_request_s_max} s")
    elif head is None:
        answer = _answer(431, f"over {limits.metrics_request_bytes_max} bytes")
    elif not head:
        return  # it connected, and left
    else:
        answer = respond(head, pages)
    await stream.send_all(answer)
    await stream.send_eof()
    await _until_gone(stream)


async def _head(stream: trio.SocketStream) -> bytes | None:
    """The request up to its empty line; b"" if it never came to that, None if it is too long."""
    head = b""
    while not any(end in head for end in _ENDS):
        if len(head) > limits.metrics_request_bytes_max:
            return None
        data = await stream.receive_some(4096)
        if not data:
            return b""
        head += data
    return head


async def _until_gone(stream: trio.SocketStream) -> None:
    """Lets the other side read: closing on unread input would tear away what we have sent."""
    taken = 0
    while taken <= limits.metrics_request_bytes_max and (data := await stream.receive_some(4096)):
        taken += len(data)


def respond(head: bytes, pages: dict[str, Page]) -> bytes:
    """The whole answer to a request of which `head` is the first part."""
    words = head.split(b"\n", 1)[0].rstrip(b"\r").split(b" ")
    if len(words) != 3 or not all(words) or not words[2].startswith(b"HTTP/"):
        return _answer(400, "this is no HTTP request")
    method, target, http = words
    if http not in (b"HTTP/1.0", b"HTTP/1.1"):
        return _answer(505, "HTTP/1.1, please")
    if method != b"GET":
        return _answer(405, "only GET")
    page = pages.get(target.split(b"?", 1)[0].decode("latin-1"))
    if page is None:
        return _answer(404, f"there are {' and '.join(pages)}")
    try:
        content = page.content()
    except Exception as error:  # it costs the scraper its answer, and the node nothing
        log.error("a page for %s could not be made: a bug of ours", target, exc_info=error)
        return _answer(500, "this page could not be made; the node's log says why")
    return _message(200, page.content_type, content)


def _answer(status: int, why: str) -> bytes:
    return _message(status, TEXT, (why + "\n").encode())


def _message(status: int, content_type: str, body: bytes) -> bytes:
    lines = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(["Allow: GET"] if status == 405 else []),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
