"""`--memory` is kept: what is loaded is counted before, and nothing in use is let go."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from blyan_node.moe.trunk import Trunk
from blyan_node.services.held import NoRoom, Reason
from blyan_node.services.memory import Memory, Sort, resident
from blyan_node.services.near import Near
from blyan_node.services.session import Session
from blyan_node.services.supply import silent
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.mxfp4 import make_mxfp4_checkpoint
from blyan_node.testing.swarm import Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text
from protocols.rpc.generate import GenerateRequest, Token
from storage.pins import Pin

PROMPT = list(range(2, 40))
POSITION = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, dimensions, bytes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral") / "m"
    return make_checkpoint("mixtral", path, num_hidden_layers=2, num_local_experts=4)


class Told:
    """Alice, who publishes and answers by herself."""

    def __init__(self, alice: SwarmNode, model: BlockId) -> None:
        self.alice, self.model = alice, model
        self.heads = alice.store.heads(model)
        self.memory = alice.holding.memory
        self.trunk = sum(
            alice.holding.size_of(block) for name, block in self.heads.items() if "exp" not in name
        )
        self.one = alice.holding.size_of(self.expert(0))

    def expert(self, number: int) -> BlockId:
        return self.heads[Subject(f"layer0.expert{number}")]

    async def place_all(self) -> None:
        for name, block in self.heads.items():
            if "expert" in name:
                await self.alice.holding.keep(block, Reason.PLACEMENT)

    async def ask(self, count: int = 2) -> object:
        request = GenerateRequest(
            model="tiny", prompt_ids=PROMPT, max_tokens=count, ignore_eos=True
        )
        return await self.alice.generation.generate(request, nobody)


@asynccontextmanager
async def told(path: Path, tmp_path: Path) -> AsyncIterator[Told]:
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    async with swarm.started():
        published = await alice.publish(path, "tiny")
        yield Told(alice, published.model)


def nobody(token: Token) -> None:
    """Somebody asked, and does not listen."""


def packs(node: SwarmNode) -> set[str]:
    """The blocks that have a pack file."""
    return {path.stem for path in (node.swarm.directory / node.name / "packs").iterdir()}


@trio_test
async def test_a_trunk_that_can_never_fit_is_named_with_what_to_do(
    tiny: Path, tmp_path: Path
) -> None:
    async with told(tiny, tmp_path) as t:
        await t.alice.holding.keep(t.expert(0), Reason.PLACEMENT)
        t.memory.budget = t.trunk - 1
        with pytest.raises(Refused, match=r"the trunk of tiny does not fit .* --memory") as refused:
            await t.ask()
        assert refused.value.code is ErrorCode.NOT_ALLOWED
        assert refused.value.data["bytes"] == t.trunk
        assert t.alice.holding.keeps(t.expert(0))  # nothing is let go in vain
        assert t.memory.trunks == 0 and packs(t.alice) == {cid_text(t.expert(0))}


@trio_test
async def test_what_is_ordered_stays_and_the_trunk_is_refused(tiny: Path, tmp_path: Path) -> None:
    async with told(tiny, tmp_path) as t:
        await t.alice.holding.keep(t.expert(0), Reason.ORDER)
        await t.alice.holding.keep(t.expert(1), Reason.PLACEMENT)
        t.memory.budget = t.trunk + t.one - 1
        with pytest.raises(Refused, match=r"trunk of tiny does not fit .* Drop experts"):
            await t.ask()
        assert t.alice.holding.keeps(t.expert(0)) and not t.alice.holding.keeps(t.expert(1))
        assert Pin.HELD not in t.alice.store.pins.of(t.expert(1))
        assert packs(t.alice) == {cid_text(t.expert(0))}


@trio_test
async def test_placed_experts_make_room_for_this_nodes_own_requests(
    tiny: Path, tmp_path: Path
) -> None:
    async with told(tiny, tmp_path) as t:
        for number in range(4):
            await t.alice.holding.keep(t.expert(number), Reason.PLACEMENT)
        cache = POSITION * (len(PROMPT) + 2)
        t.memory.budget = t.trunk + cache + 2 * t.one
        with t.alice.holding.use([t.expert(0)]):
            await t.ask()
            assert t.alice.holding.get(t.expert(0))  # it was in use, and the longest unused
        assert t.memory.free >= 0 == t.memory.caches
        gone = [n for n in range(4) if not t.alice.holding.keeps(t.expert(n))]
        assert len(gone) >= 2
        for number in gone:
            assert Pin.HELD not in t.alice.store.pins.of(t.expert(number))
        held = {cid_text(one.what.block) for one in t.alice.holding.held()}
        trunk = {cid_text(block) for name, block in t.heads.items() if "exp" not in name}
        assert packs(t.alice) == held | trunk


@trio_test
async def test_placement_does_not_push_out_what_answers(tiny: Path, tmp_path: Path) -> None:
    async with told(tiny, tmp_path) as t:
        await t.ask()
        for held in t.alice.holding.held():
            await t.alice.holding.drop(held.what.block)
        t.memory.budget = t.trunk + t.one
        await t.alice.holding.keep(t.expert(0), Reason.PLACEMENT)
        with pytest.raises(NoRoom):  # the trunk is idle, and stays
            await t.alice.holding.keep(t.expert(1), Reason.PLACEMENT)
        assert t.memory.trunks == t.trunk
        await t.alice.holding.keep(t.expert(2), Reason.ORDER)  # the operator's word is worth it
        assert t.memory.trunks == 0


@trio_test
async def test_a_session_that_does_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    async with told(tiny, tmp_path) as t:
        t.memory.budget = t.trunk + POSITION * (len(PROMPT) + 2) + 8 * t.one
        with pytest.raises(Refused, match=r"does not fit .* Ask for fewer tokens") as refused:
            await t.ask(4000)
        assert refused.value.code is ErrorCode.NOT_ALLOWED
        assert refused.value.data["bytes"] == POSITION * (len(PROMPT) + 4000)
        with t.memory.cache(6 * t.one), pytest.raises(Refused, match="other requests use") as busy:
            await t.ask(200)
        assert busy.value.code is ErrorCode.BUSY
        await t.ask(200)
        assert t.memory.caches == 0


@trio_test
async def test_the_budget_holds_while_experts_are_loaded_at_once(
    tiny: Path, tmp_path: Path
) -> None:
    async with told(tiny, tmp_path) as t:
        t.memory.budget = 2 * t.one + 5
        refused: list[int] = []

        async def load(number: int) -> None:
            try:
                await t.alice.holding.keep(t.expert(number), Reason.ORDER)
            except NoRoom:
                refused.append(number)
            assert t.memory.free >= 0

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(load, number)
        assert len(refused) == 2 and t.memory.experts == 2 * t.one


@trio_test
async def test_what_is_dropped_leaves_no_pack_and_nothing_was_copied(
    tiny: Path, tmp_path: Path
) -> None:
    async with told(tiny, tmp_path) as t:
        await t.alice.holding.keep(t.expert(0), Reason.ORDER)
        assert packs(t.alice) == {cid_text(t.expert(0))}
        with t.alice.holding.use([t.expert(0)]) as held:
            assert held is not None
            await t.alice.holding.drop(t.expert(0))
            assert packs(t.alice) == set() and t.alice.store.packs.bytes == 0
            assert held[0].expert.bytes == t.one == t.memory.experts
        assert t.memory.experts == 0
        await t.ask()
        assert t.memory.copied == 0


@trio_test
async def test_a_request_that_is_cancelled_leaves_nothing_behind_of_what_made_room(
    tiny: Path, tmp_path: Path
) -> None:
    async with told(tiny, tmp_path) as t:
        await t.ask()  # its trunk stays, and the experts that it needed
        passing = {one.what.block for one in t.alice.holding.held()}
        placed = next(block for n in range(4) if (block := t.expert(n)) in passing)
        await t.alice.holding.keep(placed, Reason.PLACEMENT)
        with trio.CancelScope() as scope, t.memory.cache(t.memory.budget):
            scope.cancel()
            await t.alice.holding.clear()
        assert t.memory.free == t.memory.budget and not t.alice.holding.held()
        assert Pin.HELD not in t.alice.store.pins.of(placed)
        assert packs(t.alice).isdisjoint(map(cid_text, passing))


@trio_test
async def test_a_trunk_that_made_room_leaves_no_pack_if_the_next_is_given_up(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with told(tiny, tmp_path) as t:
        await t.ask()
        assert t.memory.make_room(t.memory.budget, Sort.PLACED) and packs(t.alice)
        clear = t.alice.holding.clear

        async def cancelled() -> None:
            scope.cancel()
            await clear()

        monkeypatch.setattr(t.alice.holding, "clear", cancelled)
        with trio.CancelScope() as scope:
            await t.ask()
        assert scope.cancelled_caught and t.memory.free == t.memory.budget
        assert packs(t.alice) == set()


@trio_test
async def test_mxfp4_experts_take_what_they_take_on_the_disk(tmp_path: Path) -> None:
    path = make_mxfp4_checkpoint(tmp_path / "m", num_hidden_layers=2)
    async with told(path, tmp_path) as t:
        await t.alice.holding.keep(t.expert(0), Reason.ORDER)
        assert t.memory.experts == 3 * 64 * 96 * 17 // 32 + 2 * (2 * 96 + 64)
        assert t.memory.copied == 0


@trio_test
async def test_what_is_computed_with_is_waited_for(tiny: Path, tmp_path: Path) -> None:
    async with told(tiny, tmp_path) as t:
        t.memory.budget = t.one
        await t.alice.holding.load(t.expert(0))
        async with trio.open_nursery() as nursery:
            with t.alice.holding.use([t.expert(0)]):
                nursery.start_soon(t.alice.holding.load, t.expert(1))
                await trio.testing.wait_all_tasks_blocked()
                assert t.alice.holding.get(t.expert(0))
        assert t.alice.holding.get(t.expert(1)) and not t.alice.holding.get(t.expert(0))


def test_sorts_are_asked_in_order_and_only_as_far_as_needed() -> None:
    memory = Memory(100, experts=70, trunks=30)
    asked: list[Sort] = []

    def lender(sort: Sort, lends: int) -> None:
        def lend(size: int) -> None:
            asked.append(sort)
            memory.experts -= lends

        memory.lender(sort, lend)

    lender(Sort.PLACED, 40)
    lender(Sort.PASSING, 10)
    lender(Sort.IDLE, 10)
    assert memory.make_room(5, Sort.PLACED) and asked == [Sort.PASSING]
    assert not memory.make_room(50, Sort.IDLE) and asked[1:] == [Sort.PASSING, Sort.IDLE]
    assert not memory.make_room(101, Sort.PLACED) and len(asked) == 3


def test_the_system_is_asked_for_what_is_resident() -> None:
    found = resident()
    assert found is None or (found.anonymous > 2**20 and found.file > 2**20)


@trio_test
async def test_a_model_that_lacks_a_part_of_its_configuration_is_refused_by_name(
    tiny: Path, tmp_path: Path
) -> None:
    async with told(tiny, tmp_path) as t:
        description = await t.alice.models.describe(t.model)
        for name in ("layer1.attention", "layer0.expert3"):
            heads = {subject: block for subject, block in t.heads.items() if subject != name}
            with pytest.raises(Refused, match=f"tiny has no {name}") as refused:
                async with t.alice.trunks.use(description, heads, "as-published", silent):
                    pass
            assert refused.value.code is ErrorCode.BAD_MODEL and t.memory.trunks == 0


class Meanwhile(dict[int, Callable[[], Awaitable[None]]]):
    """What is done while a token is computed, by how many positions were before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        enter, loop = Session.enter, trio.lowlevel.current_trio_token()

        def enters(session: Session, ids: Any, here: Any, *given: Any) -> object:
            do = None if here is None else self.pop(session._cache.length, None)
            if do is not None:
                trio.from_thread.run(do, trio_token=loop)
            return enter(session, ids, here, *given)

        monkeypatch.setattr(Session, "enter", enters)


@pytest.mark.parametrize("needs", ["another cache", "another trunk"])
@trio_test
async def test_a_request_gets_the_memory_of_placed_experts_when_a_token_is_done(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs: str
) -> None:
    """Somebody else's answer computes with all of them when it comes."""
    async with told(tiny, tmp_path) as t, trio.open_nursery() as nursery:
        await t.place_all()
        t.memory.budget = t.trunk + 8 * t.one + POSITION * (len(PROMPT) + 9)
        description = await t.alice.models.describe(t.model)

        async def trunk() -> None:
            async with t.alice.trunks.use(description, t.heads, "bfloat16", silent):
                pass

        async def another() -> None:
            (computing,) = t.alice.holding.borrowers
            nursery.start_soon(trunk if needs == "another trunk" else t.ask)
            while isinstance(computing, Near) and not computing.asked:
                await trio.lowlevel.checkpoint()

        Meanwhile(monkeypatch)[len(PROMPT) + 3] = another
        await t.ask(9)


@trio_test
async def test_who_waits_to_compute_does_not_keep_what_others_need(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two answers that take turns, one is always about to compute with every expert."""
    make_room, tries = Memory.make_room, list[bool]()

    def tried(memory: Memory, size: int, upto: Sort) -> bool:
        tries.append(make_room(memory, size, upto))
        return tries[-1]

    async with told(tiny, tmp_path) as t, trio.open_nursery() as nursery:
        await t.place_all()
        t.memory.budget = t.trunk + 8 * t.one + 2 * POSITION * (len(PROMPT) + 900)
        for _ in range(2):
            nursery.start_soon(t.ask, 900)
        while t.alice.compute.statistics().tasks_waiting == 0 or not t.alice.holding.borrowers:
            await trio.lowlevel.checkpoint()
        monkeypatch.setattr(Memory, "make_room", tried)
        await t.alice.holding.load(t.expert(0), precision="bfloat16")
        assert t.alice.generation.running == 2
        assert tries.index(True) <= 1  # at once, or after the token that is being computed
        nursery.cancel_scope.cancel()


@trio_test
async def test_what_cannot_be_loaded_leaves_no_pack(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's model may be refused again and again, and each has files of its own."""

    def refuses_trunk(config: object, tensors: Callable[[str], object], *_: Any, **__: Any) -> None:
        assert tensors("embed") and tensors("layer0.attention")
        raise Refused(ErrorCode.BAD_MODEL, "an odd trunk", "it was told so")

    def refuses_expert(*_: Any, **__: Any) -> None:
        raise Refused(ErrorCode.BAD_MODEL, "an odd expert", "it was told so")

    async with told(tiny, tmp_path) as t:
        with monkeypatch.context() as patch:
            patch.setattr("blyan_node.services.trunks.Trunk", refuses_trunk)
            with pytest.raises(Refused, match="an odd trunk"):
                await t.ask()
        assert t.memory.trunks == 0 and packs(t.alice) == set()
        await t.alice.holding.keep(t.expert(0), Reason.ORDER)
        with monkeypatch.context() as patch:
            patch.setattr("blyan_node.services.holding.Expert", refuses_expert)
            for block, precision in ((t.expert(0), "bfloat16"), (t.expert(1), None)):
                with pytest.raises(Refused, match="an odd expert"):
                    await t.alice.holding.load(block, precision=precision)
        assert t.memory.experts == t.one and packs(t.alice) == {cid_text(t.expert(0))}
        for narrow in ("bfloat16", "int8"):
            await t.alice.holding.load(t.expert(2), precision=narrow)
        assert packs(t.alice) == {cid_text(t.expert(0))}


@trio_test
async def test_a_trunk_that_is_being_loaded_keeps_its_packs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one of the same parts, converted, is let go in the middle of that."""
    async with told(tiny, tmp_path) as t, trio.open_nursery() as nursery:
        description, trunks = await t.alice.models.describe(t.model), t.alice.trunks
        async with trunks.use(description, t.heads, "bfloat16", silent):
            pass
        assert not packs(t.alice) & {cid_text(t.heads[Subject("embed")])}
        loop, trunk, cleared = trio.lowlevel.current_trio_token(), Trunk, trio.Event()

        async def clears() -> None:
            await trunks._clear()
            cleared.set()

        async def lets_go() -> None:
            assert t.memory.make_room(t.memory.budget - t.trunk, Sort.PLACED)
            nursery.start_soon(clears)

        def reads(*given: Any, **named: Any) -> Trunk:
            trio.from_thread.run(lets_go, trio_token=loop)
            return trunk(*given, **named)

        monkeypatch.setattr("blyan_node.services.trunks.Trunk", reads)
        async with trunks.use(description, t.heads, "as-published", silent):
            await cleared.wait()
            assert {cid_text(b) for n, b in t.heads.items() if "exp" not in n} == packs(t.alice)
