"""A call in a thread that tells values on its way."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
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

    async def start(self, turn: AbstractContextManager[Callable[[], R]]) -> None:
        """Begins a call when it has its turn; `turn` gives it then, and not to who still waits.

        In the event loop, where `turn` is over as soon as the call is.
        """
        await self._limiter.acquire_on_behalf_of(self)
        self._loop = trio.lowlevel.current_trio_token()
        with ExitStack() as stack:
            stack.callback(self._limiter.release_on_behalf_of, self)
            # Whoever waited for what the turn before had in use was woken together with us.
            await trio.lowlevel.checkpoint()
            work = stack.enter_context(turn)

            def end(result: Callable[[], R]) -> None:
                turns.close()
                self._put.send_nowait(Over(result))

            def tell(result: Callable[[], R]) -> None:
                with suppress(trio.RunFinishedError):  # nobody is left to be told
                    self._loop.run_sync_soon(end, result)

            trio.lowlevel.start_thread_soon(work, lambda outcome: tell(outcome.unwrap))
            turns, self.under_way = stack.pop_all(), True

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
