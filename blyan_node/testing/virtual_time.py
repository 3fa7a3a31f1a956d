"""Async tests in virtual time: whenever everybody sleeps, the clock jumps to who wakes first."""

import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import trio
import trio.testing

P = ParamSpec("P")
HANG_S = 100_000


def virtual_time_test(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Makes an async test function one that pytest can call; no test waits for real time.

    Threads are not seen by the clock: a test that computes in threads needs `trio_test`.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            with trio.fail_after(HANG_S):
                await test(*args, **kwargs)

        trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))

    return run
