"""Events on their way to one subscriber: bounded, in order, and honest about what is missing.

Whoever tells an event never waits. While a subscriber does not read, `events_waiting_max` events
wait for it; then the oldest are left out. The next thing that it gets is an event `dropped` with
their number, in their place.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

import trio

from blyan_node.rpc.tally import Tally
from protocols.limits import events_waiting_max
from protocols.rpc.events import Event, EventKind


class Subscription:
    """One subscriber. `send` hands over one event, `room` waits until the subscriber reads."""

    def __init__(
        self, send: Callable[[Event], None], room: Callable[[], Awaitable[None]], tally: Tally
    ) -> None:
        self.sent = 0
        self.dropped = 0
        self._send = send
        self._room = room
        self._tally = tally
        self._waiting: deque[Event] = deque()
        self._untold = 0
        self._more = trio.Event()

    def tell(self, event: EventKind, data: Mapping[str, object]) -> None:
        """Something has happened now."""
        if len(self._waiting) >= events_waiting_max:
            self._waiting.popleft()
            self._untold += 1
            self.dropped += 1
            self._tally.events_dropped += 1
        self._waiting.append(Event(event=event, time=time.time(), data=dict(data)))
        self._more.set()

    async def run(self) -> None:
        """Sends what is told, until cancelled."""
        while True:
            await self._more.wait()
            await self._room()
            self.flush()

    def flush(self) -> None:
        """Sends what waits."""
        self._more = trio.Event()
        if self._untold:
            missing = {"events": self._untold}
            self._untold = 0
            self._send(Event(event="dropped", time=time.time(), data=missing))
        while self._waiting:
            self._send(self._waiting.popleft())
            self.sent += 1
