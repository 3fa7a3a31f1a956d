"""A subscriber that is too slow misses events, is told how many, and costs nobody anything."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import wait_all_tasks_blocked

from blyan_node.rpc.subscription import Subscription
from blyan_node.rpc.tally import Tally
from blyan_node.testing.trio_tests import trio_test
from protocols.limits import events_waiting_max
from protocols.rpc.events import Event


class Reader:
    """A subscriber that reads only while `reads` is set."""

    def __init__(self) -> None:
        self.got: list[Event] = []
        self.reads = trio.Event()
        self.tally = Tally()
        self.subscription = Subscription(self.got.append, self._room, self.tally)

    async def _room(self) -> None:
        await self.reads.wait()

    def numbers(self) -> list[object]:
        return [event.data["n"] for event in self.got if event.event == "experts"]


@asynccontextmanager
async def subscribed() -> AsyncIterator[Reader]:
    reader = Reader()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.subscription.run)
        yield reader
        nursery.cancel_scope.cancel()


@trio_test
async def test_who_reads_gets_everything_in_order() -> None:
    async with subscribed() as reader:
        reader.reads.set()
        for n in range(3 * events_waiting_max):
            reader.subscription.tell("experts", {"n": n})
            if n % 50 == 0:
                await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert reader.numbers() == list(range(3 * events_waiting_max))
        assert (reader.subscription.sent, reader.subscription.dropped) == (len(reader.got), 0)


@trio_test
async def test_who_does_not_read_is_told_how_much_was_left_out() -> None:
    async with subscribed() as reader:
        for n in range(events_waiting_max + 7):
            reader.subscription.tell("experts", {"n": n})
        await wait_all_tasks_blocked()
        assert reader.got == []
        reader.reads.set()
        await wait_all_tasks_blocked()
        first, *rest = reader.got
        assert (first.event, first.data) == ("dropped", {"events": 7})
        assert [event.data["n"] for event in rest] == list(range(7, events_waiting_max + 7))
        assert reader.subscription.dropped == reader.tally.events_dropped == 7
        reader.subscription.tell("experts", {"n": -1})
        await wait_all_tasks_blocked()
        assert [event.event for event in reader.got].count("dropped") == 1, "it is said once"


@trio_test
async def test_the_end_brings_what_waits() -> None:
    async with subscribed() as reader:
        reader.subscription.tell("experts", {"n": 1})
        await wait_all_tasks_blocked()
        assert reader.got == []
    reader.subscription.flush()
    assert reader.numbers() == [1]
