"""A call in a thread that tells values on its way."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from protocols.errors import Refused

T = TypeVar("T")  # what is told
R = TypeVar("R")  # what is returned


@dataclass(frozen=True, slots=True)
class Over(Generic[R]):
    """A call is over: `result` returns what it returned, or raises what it raised."""

    result: Callable[[], R]


class Visit(Generic[T, R]):
    """Calls in a thread, one after the other, under a limiter. They wait for nobody.

    `told` and `taken` count values, and `left` says that nobody takes any more; calls read them.
    """

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self.told = self.taken = 0
        self.left = False
        self.under_way = False  # a call whose result was not taken
        self._limiter = limiter
        self._put, self._get = trio.open_memory_channel[T | Over[R]](math.inf)

    @property
    def awaited(self) -> bool:
        """Whether others wait for the limiter. From any thread."""
        return self._limiter.statistics().tasks_waiting > 0

    async def start(self, work: Callable[[], R], ended: Callable[[], None]) -> None:
        """Begins a call; `ended` is called in the event loop as soon as it is over."""
        await self._limiter.acquire_on_behalf_of(self)
        self._loop = trio.lowlevel.current_trio_token()

        def end(result: Callable[[], R]) -> None:
            self._limiter.release_on_behalf_of(self)
            self._put.send_nowait(Over(result))
            ended()

        def tell(result: Callable[[], R]) -> None:
            with suppress(trio.RunFinishedError):  # nobody is left to be told
                self._loop.run_sync_soon(end, result)

        self.under_way = True
        try:
            trio.lowlevel.start_thread_soon(work, lambda outcome: tell(outcome.unwrap))
        except BaseException:
            self.under_way = False
            self._limiter.release_on_behalf_of(self)
            raise

    def tell(self, value: T) -> None:
        """For the thread: hands a value over and goes on."""
        self.told += 1
        self._loop.run_sync_soon(self._put.send_nowait, value)

    async def take(self) -> T | Over[R]:
        """The next value, or what became of the call when there are no more."""
        found = await self._get.receive()
        if isinstance(found, Over):
            self.under_way = False
        else:
            self.taken += 1
        return found

    async def leave(self) -> None:
        """Waits for the end of a call under way, which sees that nobody takes what it tells.

        Raises what it raised, unless that was a refusal: nobody waits for what is refused.
        """
        self.left = True
        with trio.CancelScope(shield=True):
            while self.under_way:
                found = await self.take()
                if isinstance(found, Over):
                    with suppress(Refused):
                        found.result()
