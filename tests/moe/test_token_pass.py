"""A token is one call of native code: its bits, where it stops, and who else computes meanwhile."""

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe.cache import KVCache
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.here import Here
from blyan_node.moe.kernels.program import Program
from blyan_node.moe.kernels.targets import Unsupported, runnable
from blyan_node.moe.layer import Attended
from blyan_node.moe.reference import Reference
from blyan_node.testing.arithmetic import best
from blyan_node.testing.engine import Engine
from protocols.ids import expert_subject


def _kernels_run() -> bool:
    try:
        return bool(runnable())
    except Unsupported:
        return False


pytestmark = pytest.mark.skipif(
    not _kernels_run(), reason="this processor has no fused multiply-add"
)

FIRST = 5  # tokens of the prompt that go together


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The first and the last step of every native call."""
    seen: list[tuple[int, int]] = []
    walk = Program.walk

    def counted(program: Program, first: int, last: int) -> int | None:
        seen.append((first, last))
        return walk(program, first, last)

    monkeypatch.setattr(Program, "walk", counted)
    return seen


class Passes:
    """One sequence through an engine of which some experts are at hand."""

    def __init__(self, engine: Engine, cache: KVCache, missing: set[tuple[int, int]]) -> None:
        self.engine, self.cache, self.missing = engine, cache, missing
        places = engine.experts_by_place().items()
        here = {place: expert for place, expert in places if place not in missing}
        self.here = Here(engine.config, here)
        self.stops: list[int] = []  # the layers where a token had to wait

    def begin(self, ids: list[int]) -> Tensor:
        """The pass over a prompt, layer by layer."""
        return self.engine.forward([(self.cache, ids)], random.Random(1))[0]

    def token(self, token: int) -> Tensor:
        """The logits after a token."""
        trunk, rows = self.engine.trunk, slice(None)
        found = trunk.enter([token], self.cache, self.here, rows)
        while isinstance(found, Attended):
            self.stops.append(found.layer)
            outputs = self.elsewhere(found)
            found = trunk.leave(found, outputs, self.cache, self.here, rows)
        assert found is not None
        return found

    def elsewhere(self, attended: Attended) -> Tensor:
        """What other nodes would compute: [1, top_k, hidden]."""
        routed = attended.routed
        assert routed is not None
        subjects = [expert_subject(attended.layer, n) for n in routed.experts[0].tolist()]
        return torch.stack([self.engine.experts[one].apply(routed.normed) for one in subjects], 1)


def _engine(directory: Path) -> Engine:
    checkpoint = Checkpoint.open(directory)
    return Engine(checkpoint.config, checkpoint.load, best())


def _expected(directory: Path, ids: list[int]) -> tuple[Tensor, dict[int, Tensor]]:
    checkpoint = Checkpoint.open(directory)
    return Reference(checkpoint.config, checkpoint.load, best()).forward(ids)


def test_tokens_have_the_bits_of_the_reference_and_are_one_call_each(
    directory: Path, prompt: list[int], calls: list[tuple[int, int]]
) -> None:
    """The cache begins with room for two positions, so it moves again and again."""
    engine, (expected, chosen) = _engine(directory), _expected(directory, prompt)
    for again in range(2):
        passes = Passes(engine, engine.trunk.new_cache(2), set())
        got = [passes.begin(prompt[:FIRST])]
        calls.clear()
        got += [passes.token(token) for token in prompt[FIRST:]]
        assert torch.equal(torch.cat(got), expected) and not passes.stops
        used = {(layer, number): rows for layer, number, rows in passes.here.used()}
        for layer, experts in chosen.items():
            counts = experts[FIRST:].flatten().bincount(minlength=engine.config.experts_of(layer))
            assert [used.get((layer, n), 0) for n in range(len(counts))] == counts.tolist()
        assert not list(passes.here.used())
        if again:  # the steps of every expert that was needed are known now
            assert len(calls) == len(prompt) - FIRST


def test_a_token_stops_where_experts_are_elsewhere_and_goes_on_behind(
    directory: Path, prompt: list[int]
) -> None:
    engine, (expected, chosen) = _engine(directory), _expected(directory, prompt)
    everywhere = list(engine.experts_by_place())
    for missing in (set(everywhere), set(random.Random(3).sample(everywhere, 3))):
        passes = Passes(engine, engine.trunk.new_cache(), missing)
        got = [passes.begin(prompt[:FIRST])]
        got += [passes.token(token) for token in prompt[FIRST:]]
        assert torch.equal(torch.cat(got), expected)
        waits = [
            layer
            for position in range(FIRST, len(prompt))
            for layer, experts in sorted(chosen.items())
            if {(layer, number) for number in experts[position].tolist()} & missing
        ]
        assert waits and passes.stops == waits


def test_sessions_take_turns_and_do_not_meet(directory: Path, prompt: list[int]) -> None:
    """Two sequences stop at every layer in turn, and a third finds the steps taken."""
    engine, (expected, _) = _engine(directory), _expected(directory, prompt)
    other, _ = _expected(directory, prompt[::-1])
    trunk, missing, rows = engine.trunk, set(engine.experts_by_place()), slice(None)
    pair = [Passes(engine, trunk.new_cache(), missing) for _ in range(2)]
    third, kernels = Passes(engine, trunk.new_cache(), set()), best().recorded_by
    assert kernels is not None
    orders = (prompt, prompt[::-1])
    for position in range(len(prompt)):
        found = [
            trunk.enter([ids[position]], one.cache, one.here, rows)
            for one, ids in zip(pair, orders, strict=True)
        ]
        while isinstance(found[0], Attended):
            attended = [one for one in found if isinstance(one, Attended)]
            with kernels.recorder.lock if position % 3 == 1 else nullcontext():
                found = [
                    trunk.leave(met, one.elsewhere(met), one.cache, one.here, rows)
                    for one, met in zip(pair, attended, strict=True)
                ]
        with kernels.recorder.lock if position % 2 else nullcontext():
            logits = third.token(prompt[position])
        wanted = (expected[position], other[position], expected[position])
        for tensor, row in zip((*found, logits), wanted, strict=True):
            assert isinstance(tensor, Tensor) and torch.equal(tensor[0], row)


def test_a_pass_that_grew_the_cache_and_is_undone_leaves_no_old_addresses(
    directory: Path, prompt: list[int]
) -> None:
    """Steps write to the buffers that a pass layer by layer has moved to, also where it began."""
    engine, (expected, _) = _engine(directory), _expected(directory, prompt)
    passes = Passes(engine, engine.trunk.new_cache(2), set())
    passes.token(prompt[0])
    passes.begin([prompt[2]] * 4)
    passes.cache.truncate(1)
    got = [passes.token(token) for token in prompt[1:]]
    assert torch.equal(torch.cat(got), expected[1:])
