"""One client: reads its lines, runs its requests as tasks, ends them when it is gone."""

import logging
import select
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from blyan_node.rpc.context import Context
from blyan_node.rpc.outbox import ClientGone, Outbox
from blyan_node.rpc.refusals import refusal_of
from blyan_node.rpc.tally import Tally
from protocols import limits
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.rpc import codec
from protocols.rpc.codec import Call, Invalid, RequestId
from protocols.rpc.table import METHODS

log = logging.getLogger(__name__)

READ_BYTES = 64 * limits.KIB
LOOK_AGAIN_S = 0.5
STOPPING = Refused(
    ErrorCode.CANCELLED, "the request was ended", "the node is stopping", "start it, ask again"
)
CANCELLED = Refused(ErrorCode.CANCELLED, "the request was ended", "it was cancelled")

Bound = Callable[[Any, Context], Awaitable[object]]
_Answered = tuple[bytes | None, Callable[[], None]]


def _nothing() -> None:
    """Nothing is left to do after a reply."""


class Connection:
    """Serves one client until it leaves; whatever it sends, nothing escapes `serve`."""

    def __init__(
        self, stream: trio.SocketStream, handlers: Mapping[str, Bound], tally: Tally
    ) -> None:
        self._stream = stream
        self._handlers = handlers
        self._tally = tally
        self._outbox = Outbox(stream)
        self._running: dict[object, Context] = {}  # by id; notifications have none
        self._tasks = 0
        self._idle = trio.Event()

    def put(self, line: bytes) -> None:
        """Sends a line when the client takes it."""
        self._outbox.put(line)

    async def wait_not_full(self) -> None:
        """Waits while much is on its way that the client has not taken."""
        await self._outbox.wait_not_full()

    def cancel(self, request_id: RequestId) -> bool:
        """Ends a request of this client early; False if there is no such request."""
        context = self._running.get(request_id)
        if context is None:
            return False
        context.cancel()
        return True

    async def serve(self) -> None:
        """Reads and answers until the client has left or has broken the rules."""
        try:
            async with self._stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._outbox.write)
                try:
                    async with trio.open_nursery() as requests:
                        await self._read(requests)
                        if not await self._client_waits():
                            requests.cancel_scope.cancel()
                finally:
                    self._outbox.close()
        except* ClientGone as gone:
            log.debug("an RPC client is gone: %s", gone.exceptions[0])

    async def _read(self, requests: trio.Nursery) -> None:
        lines = codec.Lines()
        while True:
            await self._outbox.wait_not_full()
            try:
                with trio.fail_after(limits.rpc_line_s_max if lines.partial else float("inf")):
                    data = await self._stream.receive_some(READ_BYTES)
                if not data:
                    return
                for line in lines.feed(data):
                    await self._take(line, requests)
            except trio.BrokenResourceError:
                return
            except trio.TooSlowError:
                self._refuse_line(f"half a line, and no more for {limits.rpc_line_s_max} s")
                return
            except RemoteProtocolError as error:
                self._refuse_line(error.why)
                return

    def _refuse_line(self, why: str) -> None:
        refused = Refused(ErrorCode.PARSE, "this line cannot be read", why)
        self.put(self._error(None, refused))

    async def _take(self, line: bytes, requests: trio.Nursery) -> None:
        try:
            parsed = codec.parse(line)
        except RemoteProtocolError as error:
            self._refuse_line(error.why)
            return
        self._tasks += 1
        if parsed.batch:
            requests.start_soon(self._answer_batch, parsed.calls)
        else:
            requests.start_soon(self._answer_line, parsed.calls[0])
        # Short requests finish here, so that a client that sends many is not told BUSY.
        await trio.lowlevel.checkpoint()

    async def _answer_line(self, call: Call | Invalid) -> None:
        try:
            reply, replied = await self._answer(call)
            if reply is not None:
                self.put(reply)
            replied()
        finally:
            self._ended()

    async def _answer_batch(self, calls: tuple[Call | Invalid, ...]) -> None:
        replies: list[_Answered] = [(None, _nothing)] * len(calls)

        async def one(index: int) -> None:
            replies[index] = await self._answer(calls[index])

        try:
            async with trio.open_nursery() as nursery:
                for index in range(len(calls)):
                    nursery.start_soon(one, index)
            present = [reply for reply, _ in replies if reply is not None]
            if present:
                self.put(codec.batch(present))
            for _, replied in replies:
                replied()
        finally:
            self._ended()

    def _ended(self) -> None:
        self._tasks -= 1
        idle, self._idle = self._idle, trio.Event()
        idle.set()

    async def _answer(self, call: Call | Invalid) -> _Answered:
        """The reply to one call (None for a notification), and what to do once it is on its way."""
        if isinstance(call, Invalid):
            return self._error(call.id, call.refusal()), _nothing
        refused = self._refusal_before(call)
        if refused is not None:
            return self._error(call.id, refused) if call.wants_reply else None, _nothing
        context = Context(call.id, self)
        reply = await self._run(call, context)
        return reply if call.wants_reply else None, context.replied

    def _refusal_before(self, call: Call) -> Refused | None:
        if call.id is not None and call.id in self._running:
            return Refused(
                ErrorCode.INVALID_REQUEST, "this id is in use", "its request is not answered yet"
            )
        if len(self._running) >= limits.rpc_in_flight_max and call.method != "rpc.cancel":
            return Refused(
                ErrorCode.BUSY,
                "too many requests at once",
                f"{limits.rpc_in_flight_max} of this connection are not answered yet",
                "wait for some of them",
            )
        return None

    async def _run(self, call: Call, context: Context) -> bytes:
        key = object() if call.id is None else call.id
        self._running[key] = context
        self._tally.asked(call.method)
        self._tally.in_flight += 1
        try:
            with context.scope:
                return codec.result(call.id, await self._handle(call, context))
            return self._error(call.id, CANCELLED)
        except trio.Cancelled:
            if call.wants_reply:  # the whole node stops: its clients are told
                self.put(self._error(call.id, STOPPING))
            raise
        except Exception as error:  # a bug in one request must not end the node for all others
            return self._error(call.id, refusal_of(error, call.method))
        finally:
            del self._running[key]
            self._tally.in_flight -= 1

    def _error(self, request_id: RequestId | None, refused: Refused) -> bytes:
        self._tally.refused(refused)
        return codec.error(request_id, refused)

    async def _handle(self, call: Call, context: Context) -> object:
        handler = self._handlers.get(call.method)
        if handler is None:
            raise Refused(
                ErrorCode.METHOD_NOT_FOUND,
                f"there is no method {call.method[:80]!r}",
                "",
                "`rpc.discover` lists the methods",
            )
        return await handler(call.request(METHODS[call.method].request), context)

    async def _client_waits(self) -> bool:
        """After the client's last line: waits for its answers; False once it is gone itself.

        The end of what it sends may be half a close (`… | nc -N`), and then it still reads.
        """
        poll = select.poll()
        poll.register(self._stream.socket.fileno(), 0)
        while self._tasks:
            if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
                return False
            with trio.move_on_after(LOOK_AGAIN_S):
                await self._idle.wait()
        return True


def same_user(sock: trio.socket.SocketType, uid: int) -> bool:
    """Whether the process at the other end is `uid`'s (where the system can tell)."""
    peer_credentials = getattr(socket, "SO_PEERCRED", None)
    if peer_credentials is None:  # not Linux: the folder's and the socket's modes are the guard
        return True
    raw = sock.getsockopt(socket.SOL_SOCKET, peer_credentials, 12)
    return int.from_bytes(raw[4:8], sys.byteorder) in (uid, 0)
