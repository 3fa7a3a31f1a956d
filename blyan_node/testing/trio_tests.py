"""Runs an async test under trio, with a deadline around anything that could hang."""

import functools
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import trio

P = ParamSpec("P")
HANG_S = 120


def trio_test(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Makes an async test function one that pytest can call."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def bounded() -> None:
            with trio.fail_after(HANG_S):
                await test(*args, **kwargs)

        trio.run(bounded)

    return run
