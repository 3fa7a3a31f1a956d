"""A call in a thread hands values over without waiting, and its end is seen at once."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import trio
import trio.testing

from blyan_node.services.visit import Over, Visit
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused


@trio_test
async def test_values_come_in_their_order_and_then_what_became_of_the_call() -> None:
    limiter, seen = trio.CapacityLimiter(1), list[str]()
    visit = Visit[int, str](limiter)

    def work() -> str:
        for value in range(100):
            visit.tell(value)
        return "done"

    @contextmanager
    def turn() -> Iterator[Callable[[], str]]:
        seen.append("begins")
        yield work
        seen.append("ends")

    async with limiter, trio.open_nursery() as nursery:
        nursery.start_soon(visit.start, turn())
        await trio.testing.wait_all_tasks_blocked()
        assert not seen and not visit.under_way
        limiter.total_tokens = 2
    assert seen[0] == "begins"
    values = [await visit.take() for _ in range(100)]
    over = await visit.take()
    assert values == list(range(100)) and visit.told == visit.taken == 100
    assert isinstance(over, Over) and over.result() == "done" and not visit.under_way
    assert seen == ["begins", "ends"] and limiter.borrowed_tokens == 0


@trio_test
async def test_what_it_raises_is_raised_to_who_takes() -> None:
    visit = Visit[int, None](trio.CapacityLimiter(1))

    def work() -> None:
        visit.tell(1)
        raise KeyError("there")

    await visit.start(nullcontext(work))
    assert await visit.take() == 1
    over = await visit.take()
    assert isinstance(over, Over)
    with pytest.raises(KeyError, match="there"):
        over.result()


@trio_test
async def test_the_limiter_is_free_when_the_call_is_over_whoever_takes() -> None:
    limiter = trio.CapacityLimiter(1)
    visit, seen = Visit[int, None](limiter), list[bool]()
    waits, may_end = trio.Event(), threading.Event()

    def work() -> None:
        may_end.wait()
        seen.append(visit.awaited)

    await visit.start(nullcontext(work))
    assert not visit.awaited
    async with trio.open_nursery() as nursery:

        async def other() -> None:
            waits.set()
            async with limiter:
                pass

        nursery.start_soon(other)
        await waits.wait()
        while not limiter.statistics().tasks_waiting:
            await trio.lowlevel.checkpoint()
        may_end.set()
    assert seen == [True] and visit.under_way  # nothing was taken, and the other one had its turn
    await visit.leave()


@trio_test
async def test_leaving_waits_for_a_call_that_sees_it() -> None:
    limiter = trio.CapacityLimiter(1)
    visit, begun = Visit[int, int](limiter), threading.Event()

    def work() -> int:
        count = 0
        while not visit.left:
            visit.tell(count)
            count += 1
            begun.set()
        return count

    with trio.CancelScope() as scope:
        await visit.start(nullcontext(work))
        await trio.to_thread.run_sync(begun.wait)
        scope.cancel()
        await visit.leave()  # although nobody may wait here any more
    assert not visit.under_way and limiter.borrowed_tokens == 0


@trio_test
async def test_who_is_cancelled_in_the_queue_has_begun_nothing() -> None:
    limiter, called = trio.CapacityLimiter(1), list[str]()
    visit = Visit[int, None](limiter)

    @contextmanager
    def turn() -> Iterator[Callable[[], None]]:
        called.append("begins")
        yield lambda: called.append("work")

    async with limiter:
        with trio.CancelScope() as scope:
            scope.cancel()
            await visit.start(turn())
    assert scope.cancelled_caught and not called and not visit.under_way
    assert limiter.borrowed_tokens == 0
    await visit.leave()


@pytest.mark.parametrize(
    ("raised", "seen"),
    [(KeyError("a bug"), True), (Refused(ErrorCode.BUSY, "what", "why"), False)],
)
@trio_test
async def test_a_bug_is_not_lost_when_nobody_takes(raised: Exception, seen: bool) -> None:
    visit = Visit[int, None](trio.CapacityLimiter(1))

    def work() -> None:
        raise raised

    await visit.start(nullcontext(work))
    with pytest.raises(KeyError) if seen else nullcontext():
        await visit.leave()
    assert not visit.under_way


@trio_test
async def test_what_cannot_begin_keeps_nobody_waiting() -> None:
    limiter = trio.CapacityLimiter(1)
    visit = Visit[int, None](limiter)

    @contextmanager
    def turn() -> Iterator[Callable[[], None]]:
        raise KeyError("a bug")
        yield lambda: None

    with pytest.raises(KeyError, match="a bug"):
        await visit.start(turn())
    assert not visit.under_way and limiter.borrowed_tokens == 0
    await visit.leave()
