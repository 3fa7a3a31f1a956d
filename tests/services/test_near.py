"""A token whose experts are here stays in one thread; where some are not, nothing else changes."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.moe.kernels.program import Program
from blyan_node.moe.kernels.targets import Unsupported, runnable
from blyan_node.services import decoding
from blyan_node.services.near import Near
from blyan_node.services.session import Session
from blyan_node.services.visit import Visit
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.swarm import Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols.ids import BlockId
from protocols.rpc.generate import GenerateRequest, GenerateResult, Token

PROMPT, NEW = [3, 14, 15, 92, 65, 35, 89, 79], 9
LAYERS, EXPERTS, TOP = 3, 6, 2
ALL = [f"layer{layer}.expert{expert}" for layer in range(LAYERS) for expert in range(EXPERTS)]


def nobody(token: Token) -> None:
    """Takes tokens and does nothing with them."""


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each visit to the compute thread is: a step of the prompt, by name, or a visit."""
    seen: list[str] = []
    compute, start = Session._compute, Visit.start

    async def counted(session: Session, work: Any, take: Any) -> object:
        seen.append(work.func.__name__)
        return await compute(session, work, take)

    async def visited(visit: Visit[int, object], *given: Any) -> None:
        seen.append("visit")
        await start(visit, *given)

    monkeypatch.setattr(Session, "_compute", counted)
    monkeypatch.setattr(Visit, "start", visited)
    return seen


async def _answer(alice: SwarmNode) -> GenerateResult:
    request = GenerateRequest(model="tiny", prompt_ids=PROMPT, max_tokens=NEW, ignore_eos=True)
    return await alice.generation.generate(request, nobody)


async def _swarm_of_two(swarm: Swarm, path: Path, here: list[str], there: list[str]) -> BlockId:
    alice, bob = swarm.nodes["alice"], swarm.nodes["bob"]
    model = (await alice.publish(path, "tiny")).model
    await alice.hold(model, here)
    await bob.hold(model, there)
    await alice.sees(len(here) + len(there))
    return model


@pytest.mark.parametrize("missing", [0, 1, len(ALL)])
@trio_test
async def test_tokens_and_trace_are_the_same_wherever_experts_are(
    tmp_path: Path, hops: list[str], missing: int
) -> None:
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    swarm.node("bob")
    async with swarm.started():
        await _swarm_of_two(swarm, path, ALL[missing:], ALL[:missing])
        hops.clear()
        result = await _answer(alice)
        assert result.token_ids == open_reference(path).generate(PROMPT, NEW)
        rows = [entry.peers for entry in result.trace.values()]
        assert sum(sum(peers.values()) for peers in rows) == (len(PROMPT) + NEW - 1) * LAYERS * TOP
        for subject, entry in result.trace.items():
            if subject in ALL[missing:]:
                assert set(entry.peers) == {alice.peer_id}
    # The prompt always goes layer by layer.
    assert hops[: 1 + LAYERS] == ["enter"] + ["leave"] * LAYERS
    visits = hops[1 + LAYERS :]
    assert set(visits) == {"visit"}
    if missing == 0:
        assert len(visits) == 1
    if missing == len(ALL):  # behind the last layer it goes on to the first one of the next token
        assert len(visits) == 1 + LAYERS * (NEW - 1)
    assert not [held for held in alice.holding.held() if held.users]


@trio_test
async def test_what_is_dropped_meanwhile_leaves_when_the_token_is_done(
    tmp_path: Path, hops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is dropped in the middle of a token: it is computed to its end, and then gone."""
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    swarm.node("bob")
    enter, dropped = Session.enter, list[BlockId]()
    loop = trio.lowlevel.current_trio_token()

    async def drop() -> None:
        dropped.extend(held.what.block for held in alice.holding.held())
        for block in dropped:
            await alice.holding.drop(block)
        assert alice.holding.memory.experts > 0

    def drops(session: Session, *given: Any) -> object:
        if session._cache.length == len(PROMPT) + 2:
            trio.from_thread.run(drop, trio_token=loop)
        return enter(session, *given)

    async with swarm.started():
        await _swarm_of_two(swarm, path, ALL, [])
        hops.clear()
        monkeypatch.setattr(Session, "enter", drops)
        result = await _answer(alice)
        assert dropped and result.token_ids == open_reference(path).generate(PROMPT, NEW)
        kept = [held for held in alice.holding.held() if held.what.block in dropped]
        assert all(held.reason.value == "passing" for held in kept)  # loaded again for the rest
        assert hops.count("visit") == 1 + LAYERS * (NEW - 4) + 1  # what is passing is not near


@trio_test
async def test_what_is_given_back_between_two_tokens_is_not_kept_alive(tmp_path: Path) -> None:
    """A session may wait long for its next token: whoever asked needs the memory now."""
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    swarm.node("bob")
    async with swarm.started():
        model = await _swarm_of_two(swarm, path, ALL[:1], [])
        ((block, expert),) = [(one.what.block, one.expert) for one in alice.holding.held()]
        config = (await alice.models.describe(model)).config
        holding = alice.holding
        near = Near(holding, config, {0: {0: block}}, holding.precision, lambda *used: None)
        here = near.begin()
        assert here.fill(0, [0])
        near.end()
        alive = weakref.ref(expert)
        del expert, here
        await holding.drop(block)
        assert not near.current and holding.memory.experts == 0 and alive() is None


@trio_test
async def test_a_token_is_one_native_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        runnable()
    except Unsupported as error:
        pytest.skip(str(error))
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    swarm.node("bob")
    walk, calls = Program.walk, list[tuple[int, int]]()

    def counted(program: Program, first: int, last: int) -> int | None:
        calls.append((first, last))
        return walk(program, first, last)

    monkeypatch.setattr(Program, "walk", counted)
    async with swarm.started():
        await _swarm_of_two(swarm, path, ALL, [])
        first = await _answer(alice)  # the steps of each expert are recorded when it is needed
        calls.clear()
        again = await _answer(alice)
    assert again.token_ids == first.token_ids and again.trace == first.trace
    assert len(calls) == NEW - 1 and set(calls) == {(0, calls[0][1])}


@trio_test
async def test_between_tokens_experts_are_given_back_to_who_needs_their_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    swarm.node("bob")
    end, left = Near.end, list[tuple[int, int]]()

    async with swarm.started():
        await _swarm_of_two(swarm, path, ALL, [])

        def asks(near: Near) -> None:
            """They are asked back between two tokens."""
            end(near)
            for borrower in tuple(alice.holding.borrowers):
                borrower.give_back()
            users = sum(held.users for held in alice.holding.held())
            left.append((users, len(alice.holding.borrowers)))

        monkeypatch.setattr(decoding, "AHEAD_MAX", 0)
        monkeypatch.setattr(Near, "end", asks)
        result = await _answer(alice)
        assert left == [(0, 0)] * (NEW - 1)
        assert result.token_ids == open_reference(path).generate(PROMPT, NEW)
        rows = [entry.peers for entry in result.trace.values()]
        assert sum(sum(peers.values()) for peers in rows) == (len(PROMPT) + NEW - 1) * LAYERS * TOP
        assert not alice.holding.borrowers


@trio_test
async def test_what_comes_and_goes_in_passing_does_not_end_a_visit(
    tmp_path: Path, hops: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another request loads what it needs, again and again: that is nobody's here."""
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    swarm.node("bob")
    enter, blocks = Session.enter, list[BlockId]()
    loop = trio.lowlevel.current_trio_token()

    async def load() -> None:
        holding = alice.holding
        for block in (blocks.pop(), blocks.pop()):
            await holding.load(block, precision="bfloat16")
            holding.memory.budget -= holding.memory.free  # the next one takes its place
        assert len(holding.held()) == len(ALL) + 1

    def loads(session: Session, *given: Any) -> object:
        if session._cache.length == len(PROMPT) + 2:
            trio.from_thread.run(load, trio_token=loop)
        return enter(session, *given)

    async with swarm.started():
        await _swarm_of_two(swarm, path, ALL, [])
        blocks += [held.what.block for held in alice.holding.held()]
        hops.clear()
        monkeypatch.setattr(Session, "enter", loads)
        result = await _answer(alice)
        assert result.token_ids == open_reference(path).generate(PROMPT, NEW)
    assert len(blocks) == len(ALL) - 2 and hops[1 + LAYERS :] == ["visit"]
