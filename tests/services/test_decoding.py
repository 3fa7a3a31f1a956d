"""Tokens are computed ahead of who takes them, so far and no further; others have their turn."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.moe.here import Here
from blyan_node.moe.sampling import Sampler
from blyan_node.moe.torch_errors import OutOfMemory
from blyan_node.services import decoding, generation
from blyan_node.services.near import Near
from blyan_node.services.prompts import Question
from blyan_node.services.session import Session
from blyan_node.services.visit import Visit
from blyan_node.services.writer import Ends, Finish, Writer
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.swarm import Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused
from protocols.rpc.generate import GenerateRequest, Token

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79]
ALL = [f"layer{layer}.expert{expert}" for layer in range(3) for expert in range(6)]


def nobody(token: Token) -> None:
    """Takes tokens and does nothing with them."""


def asked(tokens: int) -> GenerateRequest:
    return GenerateRequest(
        model="tiny", prompt_ids=PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True
    )


@asynccontextmanager
async def alone(tmp_path: Path) -> AsyncIterator[SwarmNode]:
    """A node that holds the whole of a model."""
    path = make_checkpoint("mixtral", tmp_path / "m")
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    async with swarm.started():
        model = (await alice.publish(path, "tiny")).model
        await alice.hold(model, ALL)
        yield alice


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that were passed on behind the prompt."""
    enter, seen = Session.enter, list[int]()

    def counted(session: Session, ids: Any, here: Any, *given: Any) -> object:
        if here is not None:
            seen.extend(ids)
        return enter(session, ids, here, *given)

    monkeypatch.setattr(Session, "enter", counted)
    return seen


@trio_test
async def test_no_token_is_computed_behind_the_last(tmp_path: Path, entered: list[int]) -> None:
    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(20), nobody)
    assert result.token_ids == open_reference(tmp_path / "m").generate(PROMPT, 20)
    assert entered == result.token_ids[:-1]


@trio_test
async def test_none_is_computed_behind_a_token_that_ends_the_answer(
    tmp_path: Path, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = open_reference(make_checkpoint("mixtral", tmp_path / "t")).generate(PROMPT, 9)
    at = next(n for n in range(4, 9) if truth[n] not in truth[:n])
    reached = Ends.reached

    def ends(self: Ends, token: int, count: int) -> Finish | None:
        return "stop" if token == truth[at] else reached(self, token, count)

    monkeypatch.setattr(Ends, "reached", ends)
    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(20), nobody)
    assert result.finish == "stop" and result.token_ids == truth[: at + 1]
    assert entered == truth[:at]


@pytest.mark.parametrize("ahead", [0, 1, 8])
@trio_test
async def test_who_takes_slowly_is_not_left_behind(
    tmp_path: Path, entered: list[int], monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """Whoever has a token takes no further one until the thread has come back."""
    put, begin, end = Writer.put, Near.begin, Near.end
    back, counts = trio.Event(), [0]
    back.set()

    def begins(near: Near) -> Here:
        nonlocal back
        back = trio.Event()
        return begin(near)

    def ends(near: Near) -> None:
        end(near)
        counts.append(len(entered))
        back.set()

    async def waits(writer: Writer, token: int) -> Finish | None:
        await back.wait()
        return await put(writer, token)

    monkeypatch.setattr(Near, "begin", begins)
    monkeypatch.setattr(decoding, "AHEAD_MAX", ahead)
    monkeypatch.setattr(Near, "end", ends)
    monkeypatch.setattr(Writer, "put", waits)
    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(40), nobody)
    assert result.token_ids == open_reference(tmp_path / "m").generate(PROMPT, 40)
    visits = [after - before for before, after in pairwise(counts)]
    assert sum(visits) == 39
    if ahead:
        assert ahead + 1 <= max(visits) <= ahead + 2  # the first of a visit may be taken meanwhile
    else:
        assert max(visits) == 1


@trio_test
async def test_what_text_may_end_waits_for_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, start, visits = generation.question, Visit.start, list[object]()

    async def may_end(*given: Any) -> Question:
        asked = await read(*given)
        return replace(asked, ends=replace(asked.ends, strings=("never said",)))

    async def counted(visit: Visit[int, object], *given: Any) -> None:
        visits.append(visit)
        await start(visit, *given)

    monkeypatch.setattr(generation, "question", may_end)
    monkeypatch.setattr(Visit, "start", counted)
    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(9), nobody)
    assert result.token_ids == open_reference(tmp_path / "m").generate(PROMPT, 9)
    assert len(visits) == 8


@trio_test
async def test_another_request_has_its_turn(tmp_path: Path) -> None:
    """A long answer that could stay in the thread does not keep a short one waiting."""
    order = list[str]()
    async with alone(tmp_path) as alice, trio.open_nursery() as nursery:

        async def run(name: str, tokens: int) -> None:
            await alice.generation.generate(asked(tokens), nobody)
            order.append(name)

        def first(token: Token) -> None:
            if not order:
                order.append("began")
                nursery.start_soon(run, "short", 3)

        await alice.generation.generate(asked(400), first)
        order.append("long")
    assert order == ["began", "short", "long"]


@trio_test
async def test_what_the_thread_raises_ends_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pick = Sampler.pick

    def fails(sampler: Sampler, logits: Any) -> int:
        if sampler.drawn == 5:
            raise Refused(ErrorCode.BAD_MODEL, "no next token", "it was told so")
        return pick(sampler, logits)

    monkeypatch.setattr(Sampler, "pick", fails)
    async with alone(tmp_path) as alice:
        told = list[Token]()
        with pytest.raises(Refused, match="it was told so"):
            await alice.generation.generate(asked(20), told.append, cancelled=trio.Event())
        assert len(told) == 5
        assert not [held for held in alice.holding.held() if held.users]
        assert alice.holding.memory.caches == 0


@trio_test
async def test_cancelled_in_the_middle_nothing_is_left(tmp_path: Path) -> None:
    cancelled, told = trio.Event(), list[Token]()

    def emit(token: Token) -> None:
        told.append(token)
        if len(told) == 3:
            cancelled.set()

    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(400), emit, cancelled=cancelled)
        assert result.finish == "cancelled" and 3 <= len(result.token_ids) < 400
        assert result.token_ids == [token.token_id for token in told]
        assert not [held for held in alice.holding.held() if held.users]
        assert alice.holding.memory.caches == 0


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Is set when nobody takes the tokens of an answer any more, and its thread is waited for."""
    leave, left = Visit.leave, threading.Event()

    async def leaves(visit: Visit[int, object]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave, visit)
            with trio.CancelScope(shield=True):
                while not visit.left:
                    await trio.lowlevel.checkpoint()
            left.set()

    monkeypatch.setattr(Visit, "leave", leaves)
    return left


@trio_test
async def test_nothing_more_is_computed_when_nobody_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abandoned: threading.Event
) -> None:
    """The answer is cancelled while its third token is computed, which is the last then."""
    enter, entered, cancelled = Session.enter, list[int](), trio.Event()
    loop = trio.lowlevel.current_trio_token()

    def waits(session: Session, ids: Any, here: Any, *given: Any) -> object:
        if here is not None:
            entered.extend(ids)
            if len(entered) == 2:
                loop.run_sync_soon(cancelled.set)
                abandoned.wait()
        return enter(session, ids, here, *given)

    monkeypatch.setattr(Session, "enter", waits)
    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(400), nobody, cancelled=cancelled)
    assert result.finish == "cancelled" and len(entered) == 2


@trio_test
async def test_memory_that_ends_when_nobody_takes_the_token_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abandoned: threading.Event
) -> None:
    """A device is full at the moment when the client cancels: it gets what it had."""
    pick, cancelled = Sampler.pick, trio.Event()
    loop = trio.lowlevel.current_trio_token()

    def full(sampler: Sampler, logits: Any) -> int:
        if sampler.drawn == 3:
            loop.run_sync_soon(cancelled.set)
            abandoned.wait()
            raise OutOfMemory("CUDA out of memory.")
        return pick(sampler, logits)

    monkeypatch.setattr(Sampler, "pick", full)
    async with alone(tmp_path) as alice:
        result = await alice.generation.generate(asked(400), nobody, cancelled=cancelled)
        assert result.finish == "cancelled" and len(result.token_ids) <= 3
        assert not [held for held in alice.holding.held() if held.users]
