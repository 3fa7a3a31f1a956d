"""A row's bits depend on the row and the weights: the contract, held by parts and as a whole."""

import random
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from blyan_node.moe import numerics
from blyan_node.moe.arithmetic import Arithmetic, choose
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.reference import Reference
from blyan_node.moe.routing import route_softmax
from blyan_node.moe.trunk import Trunk
from blyan_node.testing.arithmetic import best
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.engine import Engine

pytestmark = pytest.mark.slow  # whole models, many of them

SHAPES = [
    (1, 3), (6, 40), (7, 24), (56, 40), (97, 37), (129, 257), (300, 48), (576, 1536),
    (1536, 576), (2880, 720), (2048, 1024),
]  # fmt: skip
PROMPT = [(31 * i * i + 17 * i + 5) % 89 + 2 for i in range(70)]


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _moved(x: Tensor, by: int) -> Tensor:
    """The same values at an address that is `by` floats past a multiple of 64 bytes."""
    memory = torch.empty(x.numel() + 32)
    first = -(memory.data_ptr() // 4) % 16 + by
    return memory[first : first + x.numel()].view(x.shape).copy_(x)


@pytest.fixture(params=["best", "torch"])
def rules(request: pytest.FixtureRequest) -> Arithmetic:
    """The arithmetic of this machine, and the one that every machine has."""
    return best() if request.param == "best" else choose("torch")


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_products(rules: Arithmetic, out: int, into: int, by_columns: bool, threads: int) -> None:
    weight, x = _noise(out, into, seed=1), _noise(19, into, seed=2)
    weight = weight.t().contiguous().t() if by_columns else weight
    product = rules.product(weight)
    alone = torch.cat([product(row[None].clone()) for row in x])
    torch.set_num_threads(threads)
    assert torch.equal(product(x), alone)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(3))
    assert torch.equal(product(x[order][:11]), alone[order][:11])
    for by in (1, 2, 4):
        assert torch.equal(product(_moved(x, by)), alone)
    assert torch.allclose(alone, x @ weight.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("width", [1, 5, 37, 576, 2880])
def test_functions_of_rows(rules: Arithmetic, width: int, threads: int) -> None:
    x, weight = 3 * _noise(33, width, seed=4), _noise(width, seed=5)

    def results(rows: Tensor) -> list[Tensor]:
        return [
            rules.rms_norm(rows, weight, 1e-5),
            rules.sigmoid(rows),
            rules.swiglu(rows, 2 * rows),
            *route_softmax(rules, rows, min(4, width), over_chosen=True),
            *route_softmax(rules, rows, min(4, width), over_chosen=False),
            *route_softmax(rules, rows, min(4, width), over_chosen=False, renormalise=False),
        ]

    alone = [
        torch.cat(parts) for parts in zip(*(results(row[None].clone()) for row in x), strict=True)
    ]
    torch.set_num_threads(threads)
    for first, last in ((0, 33), (0, 8), (5, 6), (13, 31)):
        for result, expected in zip(results(x[first:last]), alone, strict=True):
            assert torch.equal(result, expected[first:last])


@pytest.mark.parametrize("threads", [2, 4])
@pytest.mark.parametrize("seen", [1, 7, 33, 1000, 5003])
def test_attention_on_threads(seen: int, threads: int) -> None:
    query = _noise(6, 16, seed=6)
    keys, values = _noise(2, seen, 16, seed=7), _noise(2, seen, 16, seed=8)
    one = numerics.attention_row(query, keys, values, 0.25, query[:, 0])
    torch.set_num_threads(threads)
    assert torch.equal(numerics.attention_row(query, keys, values, 0.25, query[:, 0]), one)


def test_equal_logits_go_to_the_smaller_expert() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    experts, weights = route_softmax(best(), logits, 3, over_chosen=True)
    assert experts.tolist() == [[1, 2, 4]]
    assert torch.allclose(weights, torch.full((1, 3), 1 / 3))


@cache
def _engine(path: Path) -> tuple[Engine, list[Tensor]]:
    """An engine and the reference's logits of `PROMPT` and of its second half alone."""
    checkpoint = Checkpoint.open(path)
    model = Reference(checkpoint.config, checkpoint.load, best())
    logits = [model.forward(ids)[0] for ids in (PROMPT, PROMPT[35:])]
    return Engine(checkpoint.config, checkpoint.load), logits


@settings(max_examples=15, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(cuts=st.lists(st.integers(0, 70), max_size=8), seed=st.integers(0, 2**32), data=st.data())
def test_any_composition_equals_the_reference(
    shared: dict[str, Path], cuts: list[int], seed: int, data: st.DataObject
) -> None:
    """Two requests, cut anywhere, their rows mixed in any groups, on one thread or two."""
    engine, (whole, half) = _engine(shared[data.draw(st.sampled_from(sorted(shared)))])
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    composed = random.Random(seed)
    first, second = engine.trunk.new_cache(), engine.trunk.new_cache()
    got_whole, got_half = [], []
    for start, end in _ranges(cuts, 70):
        requests = [(first, PROMPT[start:end])]
        if start < 35:
            requests.append((second, PROMPT[35 + start : 35 + min(end, 35)]))
        logits = engine.forward(requests, composed)
        got_whole.append(logits[0])
        got_half.extend(logits[1:])
    assert torch.equal(torch.cat(got_whole), whole)
    assert torch.equal(torch.cat(got_half), half)


def _ranges(cuts: list[int], end: int) -> list[tuple[int, int]]:
    places = sorted({0, end, *cuts})
    return list(pairwise(places))


@pytest.fixture(scope="session")
def shared(directories: dict[str, Path]) -> dict[str, Path]:
    return directories


def test_a_pass_that_was_cut_off_is_done_again(directory: Path) -> None:
    engine, (whole, _) = _engine(directory)
    cache, composed = engine.trunk.new_cache(), random.Random(1)
    engine.forward([(cache, PROMPT[:40])], composed)
    engine.trunk.attend(0, engine.trunk.embed(PROMPT[40:60]), cache)
    assert (cache.length_of(0), cache.length) == (60, 40)
    cache.truncate(40)
    assert torch.equal(engine.forward([(cache, PROMPT[40:])], composed)[0], whole[40:])


def test_the_cache_grows_beyond_its_first_buffer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        make_checkpoint("gpt_oss", tmp_path / "m", num_hidden_layers=2, max_position_embeddings=999)
    )
    ids = [i * 7 % 90 for i in range(600)]
    engine = Engine(checkpoint.config, checkpoint.load)
    cache = engine.trunk.new_cache()
    cuts = engine.trunk.prefill_cuts(0, 600)
    logits = [engine.forward([(cache, ids[a:b])], random.Random(0))[0] for a, b in cuts]
    expected, _ = Reference(checkpoint.config, checkpoint.load, best()).forward(ids)
    assert torch.equal(torch.cat(logits), expected)
    assert cache.length == 600 and cache.bytes == 2 * 2 * 2 * 1024 * 16 * 4


@pytest.mark.parametrize(
    ("start", "count", "cuts"),
    [
        (0, 256, [(0, 256)]),
        (0, 540, [(0, 256), (256, 512), (512, 540)]),
        (254, 5, [(254, 256), (256, 259)]),
        (257, 1, [(257, 258)]),
        (5, 0, []),
    ],
)
def test_prefill_is_cut_at_fixed_positions(
    start: int, count: int, cuts: list[tuple[int, int]]
) -> None:
    assert Trunk.prefill_cuts(start, count) == cuts
