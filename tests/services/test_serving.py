"""The worker: bounded, batched, and strict about what it is asked."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import trio
import trio.testing

from blyan_node.moe.arrays import array_of, tensor_of
from blyan_node.network.errors import PeerRefused
from blyan_node.services.compute import Rows
from blyan_node.services.held import NoRoom, Reason
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.swarm import PROFILE, Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import Refused
from protocols.forward.messages import (
    PROTOCOL,
    Activate,
    Activated,
    Busy,
    ExpertRows,
    Failed,
    NotHeld,
)
from protocols.ids import BlockId, Subject
from storage.pins import Pin

HIDDEN = 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral") / "m"
    return make_checkpoint("mixtral", path, num_hidden_layers=2, num_local_experts=4)


class Pair:
    """Alice asks, bob holds layer 0."""

    def __init__(self, swarm: Swarm, model: BlockId) -> None:
        self.model = model
        self.alice, self.bob = swarm.nodes["alice"], swarm.nodes["bob"]
        self.heads = self.alice.store.heads(model)

    def block(self, layer: int, expert: int) -> BlockId:
        return self.heads[Subject(f"layer{layer}.expert{expert}")]

    def message(self, given: Rows, *experts: int, **fields: object) -> Activate:
        every = tuple(range(len(given)))
        message = Activate(
            request=bytes(16),
            model=self.model,
            layer=0,
            profile=PROFILE,
            rows=len(given),
            hidden=HIDDEN,
            within_ms=10_000,
            experts=tuple(ExpertRows(self.block(0, n), every) for n in experts),
            data=given.tobytes(),
        )
        return msgspec.structs.replace(message, **fields)

    async def ask(self, message: Activate) -> object:
        return await self.alice.network.request(self.bob.peer_id, PROTOCOL, message)

    def truth(self, rows: Rows, expert: int) -> Rows:
        held = self.bob.holding.get(self.block(0, expert))
        assert held is not None
        return np.concatenate([array_of(held.expert.apply(tensor_of(row[None]))) for row in rows])


@asynccontextmanager
async def pair(tiny: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    swarm = Swarm(tmp_path)
    alice, bob = swarm.node("alice", "main"), swarm.node("bob")
    async with swarm.started():
        published = await alice.publish(tiny, "tiny")
        await bob.hold(published.model, [f"layer0.expert{n}" for n in range(4)])
        yield Pair(swarm, published.model)


def some_rows(count: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN)).astype(np.float32)


@trio_test
async def test_rows_come_back_in_the_order_asked(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        rows = some_rows(5)
        experts = (ExpertRows(p.block(0, 2), (4, 0)), ExpertRows(p.block(0, 1), (3,)))
        reply = await p.ask(p.message(rows, experts=experts))
        assert isinstance(reply, Activated)
        expected = np.concatenate([p.truth(rows[[4, 0]], 2), p.truth(rows[[3]], 1)])
        assert reply.data == expected.tobytes()


@trio_test
async def test_what_waits_is_computed_together_and_no_bit_changes(
    tiny: Path, tmp_path: Path
) -> None:
    async with pair(tiny, tmp_path) as p:
        asked = [p.message(some_rows(1 + n, n), n % 4, (n + 1) % 4) for n in range(12)]
        replies: dict[int, object] = {}

        async def one(number: int) -> None:
            replies[number] = await p.ask(asked[number])

        await p.bob.compute.acquire()  # the compute thread is taken: all of them wait
        async with trio.open_nursery() as nursery:
            for number in range(len(asked)):
                nursery.start_soon(one, number)
            with trio.fail_after(10):
                while p.bob.serving.requests < len(asked):
                    await trio.sleep(0.01)
            p.bob.compute.release()
        for number, reply in replies.items():
            rows = some_rows(1 + number, number)
            expected = [p.truth(rows, number % 4), p.truth(rows, (number + 1) % 4)]
            assert isinstance(reply, Activated)
            assert reply.data == np.concatenate(expected).tobytes()
        held = p.bob.holding.get(p.block(0, 0))
        assert held is not None
        assert (held.calls, held.rows) == (6, sum(1 + n for n in range(12) if n % 4 in (0, 3)))


@trio_test
async def test_a_worker_that_computes_no_finite_number_says_so(tiny: Path, tmp_path: Path) -> None:
    """Or a model whose weights overflow would cost those that hold it their score."""
    async with pair(tiny, tmp_path) as p:
        failed = Failed("a value is not a finite number")
        assert await p.ask(p.message(np.full((2, HIDDEN), 3e38, np.float32), 0, 1)) == failed
        assert isinstance(await p.ask(p.message(some_rows(2), 0, 1)), Activated)


@trio_test
async def test_a_full_queue_answers_at_once(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        p.bob.serving._queue_max = 2
        await p.bob.compute.acquire()
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # one is being computed, two wait
                nursery.start_soon(p.ask, p.message(some_rows(1), 0))
                await trio.testing.wait_all_tasks_blocked()
            assert await p.ask(p.message(some_rows(1), 0)) == Busy(2)
            assert p.bob.serving.busy == 1
            p.bob.compute.release()


@trio_test
async def test_requests_of_who_is_gone_are_not_computed(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        await p.bob.compute.acquire()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(p.ask, p.message(some_rows(1), 0))
                await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        p.bob.compute.release()
        assert isinstance(await p.ask(p.message(some_rows(1), 1)), Activated)
        held = p.bob.holding.get(p.block(0, 0))
        assert held is not None and held.calls <= 1  # the one that had begun


@trio_test
async def test_a_passed_deadline_is_not_computed(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        await p.bob.compute.acquire()
        replies: list[object] = []

        async def one(within_ms: int) -> None:
            replies.append(await p.ask(p.message(some_rows(1), 0, within_ms=within_ms)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, 10_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(one, 1)
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.01)
            p.bob.compute.release()
        assert {type(reply) for reply in replies} == {Activated, Failed}


@trio_test
async def test_what_is_not_held_is_named_and_what_does_not_fit_is_refused(
    tiny: Path, tmp_path: Path
) -> None:
    async with pair(tiny, tmp_path) as p:
        rows = some_rows(2)
        other = ExpertRows(p.block(1, 0), (0,))
        reply = await p.ask(p.message(rows, experts=(ExpertRows(p.block(0, 0), (0,)), other)))
        assert reply == NotHeld((other.block,))
        assert isinstance(await p.ask(p.message(rows, 0, profile="cuda")), Failed)
        for fields in (
            {"layer": 1},
            {"model": p.block(0, 0)},
            {"hidden": HIDDEN // 2, "rows": 4, "experts": (ExpertRows(p.block(0, 0), (3,)),)},
            {"data": b""},
            {"rows": 3},
        ):
            penalties = p.bob.network.counters.penalties
            with pytest.raises(PeerRefused, match="Activate"):
                await p.ask(p.message(rows, 0, **fields))
            assert p.bob.network.counters.penalties == penalties + 1
            p.bob.network._scores.clear()


@trio_test
async def test_what_is_stored_or_passing_is_not_held(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        await p.bob.supply.ensure([p.block(1, 1)])
        await p.bob.holding.load(p.block(1, 1))
        experts = (ExpertRows(p.block(1, 1), (0,)),)
        reply = await p.ask(p.message(some_rows(1), layer=1, experts=experts))
        assert reply == NotHeld((p.block(1, 1),))


def used(node: SwarmNode) -> int:
    return sum(held.bytes for held in node.holding.held())


@trio_test
async def test_a_dropped_expert_stays_until_its_last_user_is_done(
    tiny: Path, tmp_path: Path
) -> None:
    async with pair(tiny, tmp_path) as p:
        holding, block = p.bob.holding, p.block(0, 0)
        before = holding.memory.experts
        with holding.use([block]) as held:
            assert held is not None
            await holding.drop(block)
            assert not holding.keeps(block)
            assert holding.memory.experts == before
            with holding.use([block]) as again:
                assert again is None
        assert holding.memory.experts == before - held[0].bytes == used(p.bob)
        assert Pin.HELD not in p.bob.store.pins.of(block)


@trio_test
async def test_passing_experts_make_room_and_those_in_use_do_not(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.limits.room_wait_s_max", 0.1)
    async with pair(tiny, tmp_path) as p:
        holding = p.bob.holding
        size = holding.size_of(p.block(0, 0))
        holding.memory.budget = holding.memory.experts + 2 * size
        await holding.load(p.block(1, 0))
        await holding.load(p.block(1, 1))
        with holding.use([p.block(1, 0)]):
            await holding.load(p.block(1, 2))
            assert holding.get(p.block(1, 0)) and not holding.get(p.block(1, 1))
            with holding.use([p.block(1, 2)]), pytest.raises(NoRoom):
                await holding.load(p.block(1, 3))
        await holding.keep(p.block(1, 3), Reason.PLACEMENT)
        assert holding.memory.experts == used(p.bob) <= holding.memory.budget
        assert holding.memory_free == size


@trio_test
async def test_many_who_need_one_expert_load_it_once(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(p.bob.holding.load, p.block(1, 0))
        assert p.bob.store.reads[p.block(1, 0)] == 1


@trio_test
async def test_only_experts_can_be_held(tiny: Path, tmp_path: Path) -> None:
    async with pair(tiny, tmp_path) as p:
        with pytest.raises(Refused, match="not an expert"):
            await p.bob.holding.keep(p.heads[Subject("final")], Reason.ORDER)


@trio_test
async def test_the_queue_is_bounded_in_bytes_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair(tiny, tmp_path) as p:
        monkeypatch.setattr("protocols.limits.worker_queue_bytes_max", 5 * HIDDEN * 4)
        assert isinstance(await p.ask(p.message(some_rows(5), 0)), Activated)
        assert await p.ask(p.message(some_rows(6), 0)) == Busy(0)
