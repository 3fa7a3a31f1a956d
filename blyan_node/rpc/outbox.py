"""What waits to be written to one client: bounded, and never waited for by a request.

Requests put whole lines without waiting; one task writes them. A client that lets more than
`rpc_output_bytes_max` wait, or takes nothing for `rpc_send_s_max`, is cut off: a slow reader costs
its own connection and delays nobody.
"""

from collections import deque

import trio

from protocols import limits

FLUSH_S = 1.0


class ClientGone(Exception):
    """The client does not read any more; its requests are to be ended."""


class Outbox:
    """Lines on their way to one client."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._changed = trio.Event()
        self._closed = False
        self._overflow = False
        self._shield = trio.CancelScope(shield=True)
        self._sending = trio.CancelScope()

    def put(self, line: bytes) -> None:
        """Queues one line (its newline is added); past the limit the client is given up."""
        if self._overflow:
            return
        # One answer of any size fits; what counts is what already waits.
        if self._bytes > limits.rpc_output_bytes_max:
            self._overflow = True
            self._lines.clear()
            self._sending.cancel()
        else:
            self._lines.append(line + b"\n")
            self._bytes += len(line) + 1
        self._wake()

    def close(self) -> None:
        """Nothing will follow; what waits has `FLUSH_S` to be read."""
        self._closed = True
        self._shield.deadline = trio.current_time() + FLUSH_S
        self._wake()

    @property
    def full(self) -> bool:
        """Whether so much waits that no further request should be read."""
        return self._bytes > limits.rpc_output_bytes_max // 2

    async def wait_not_full(self) -> None:
        """Waits until the client has taken some of what waits."""
        while self.full and not self._overflow:
            await self._changed.wait()

    async def write(self) -> None:
        """Writes until closed and empty; raises `ClientGone` when the client takes nothing."""
        with self._shield, self._sending:
            while self._lines or not self._closed:
                if self._lines:
                    await self._send(self._lines.popleft())
                else:
                    await self._changed.wait()
        if self._overflow:
            raise ClientGone("it let too much wait unread")

    async def _send(self, line: bytes) -> None:
        view = memoryview(line)
        try:
            while view:
                with trio.fail_after(limits.rpc_send_s_max):
                    sent = await self._stream.socket.send(view[: 256 * limits.KIB])
                view = view[sent:]
        except OSError as error:
            raise ClientGone(str(error)) from None
        except trio.TooSlowError:
            raise ClientGone(f"it took nothing for {limits.rpc_send_s_max} s") from None
        self._bytes -= len(line)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()
