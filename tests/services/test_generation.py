"""Answers of a swarm equal those of the single-process reference, whatever happens on the way."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import load_file

from blyan_node.moe.reference import Reference
from blyan_node.moe.sampling import Sampler
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.swarm import Swarm
from blyan_node.testing.trio_tests import trio_test
from protocols.ids import BlockId, cid_text
from protocols.rpc.generate import ForwardRequest, GenerateRequest, Token

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 7, 95, 2, 88, 41, 9, 71, 69]
PROMPT = PROMPT + PROMPT[::-1]
LAYERS, EXPERTS = 3, 6
ALL = [f"layer{layer}.expert{expert}" for layer in range(LAYERS) for expert in range(EXPERTS)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral") / "m")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gpt_oss", tmp_path_factory.mktemp("gpt") / "m")


@pytest.fixture(scope="module")
def truth(mixtral: Path) -> Reference:
    return open_reference(mixtral)


class Told:
    """The four nodes of the main story: alice answers, the others hold."""

    def __init__(self, swarm: Swarm, model: BlockId) -> None:
        self.swarm = swarm
        self.model = model
        self.alice, self.bob, self.carol, self.dave = (
            swarm.nodes[name] for name in ("alice", "bob", "carol", "dave")
        )

    async def seen(self, count: int) -> None:
        """Until alice knows `count` holders in all."""

        def known() -> int:
            return sum(len(peers) for _, peers in self.alice.adverts.directory.experts())

        with trio.fail_after(30):
            while known() != count:
                await self.alice.adverts.changes.wait()


@asynccontextmanager
async def story(path: Path, tmp_path: Path, holds: dict[str, list[str]]) -> AsyncIterator[Told]:
    swarm = Swarm(tmp_path)
    swarm.node("alice", "main")
    for name in ("bob", "carol", "dave"):
        swarm.node(name)
    async with swarm.started():
        published = await swarm.nodes["alice"].publish(path, "tiny")
        told = Told(swarm, published.model)
        for name, subjects in holds.items():
            await swarm.nodes[name].hold(published.model, subjects)
        await told.seen(sum(map(len, holds.values())))
        yield told


TWICE = {
    "bob": [s for i, s in enumerate(ALL) if i % 3 != 0],
    "carol": [s for i, s in enumerate(ALL) if i % 3 != 1],
    "dave": [s for i, s in enumerate(ALL) if i % 3 != 2],
}
ONCE = {name: ALL[i::3] for i, name in enumerate(TWICE)}


def ask(count: int = 12, **fields: object) -> GenerateRequest:
    defaults: dict[str, object] = {
        "model": "tiny",
        "prompt_ids": PROMPT,
        "max_tokens": count,
        "ignore_eos": True,
    }
    return GenerateRequest(**{**defaults, **fields})  # type: ignore[arg-type]


def nobody(token: Token) -> None:
    """Takes tokens and does nothing with them."""


@trio_test
async def test_every_expert_ran_elsewhere_and_the_tokens_are_those_of_the_reference(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        tokens: list[Token] = []
        result = await told.alice.generation.generate(ask(), tokens.append)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert [token.token_id for token in tokens] == result.token_ids
        assert (result.finish, result.text) == ("length", None)
        workers = {node.peer_id for node in (told.bob, told.carol, told.dave)}
        heads = told.alice.store.heads(told.model)
        for subject, entry in result.trace.items():
            assert set(entry.peers) <= workers
            assert entry.block == cid_text(heads[subject])  # type: ignore[index]
        rows = sum(sum(entry.peers.values()) for entry in result.trace.values())
        passed = len(PROMPT) + 11
        assert rows == passed * LAYERS * 2
        assert told.alice.holding.held() == ()
        stats = result.stats
        assert (stats.prompt_tokens, stats.new_tokens, stats.retries) == (len(PROMPT), 12, 0)
        assert stats.bytes_received == rows * 40 * 4
        assert 0 < stats.bytes_sent <= stats.bytes_received


@trio_test
async def test_gpt_oss_past_its_window_is_bit_equal(gpt_oss: Path, tmp_path: Path) -> None:
    reference = open_reference(gpt_oss)
    async with story(gpt_oss, tmp_path, ONCE) as told:
        result = await told.alice.generation.generate(ask(), nobody)
        assert result.token_ids == reference.generate(PROMPT, 12)


@trio_test
async def test_forward_writes_the_references_logits_and_experts(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        out = tmp_path / "out.safetensors"
        request = ForwardRequest(model="tiny", prompt_ids=PROMPT, out=str(out))
        result = await told.alice.generation.forward(request)
        logits, experts = truth.forward(PROMPT)
        written = load_file(out)
        assert set(written) == {"logits", *(f"layer{n}.experts" for n in range(LAYERS))}
        assert torch.equal(written["logits"], logits)
        for layer in range(LAYERS):
            assert torch.equal(written[f"layer{layer}.experts"], experts[layer])
            chosen = set(experts[layer].flatten().tolist())
            traced = {s for s in result.trace if s.startswith(f"layer{layer}.")}
            assert traced == {f"layer{layer}.expert{n}" for n in chosen}


@trio_test
async def test_many_requests_at_once_change_no_token(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    prompts = [PROMPT[n:] + PROMPT[:n] for n in range(8)]
    async with story(mixtral, tmp_path, TWICE) as told:
        results: dict[int, list[int]] = {}

        async def one(number: int) -> None:
            request = ask(8, prompt_ids=prompts[number])
            results[number] = (await told.alice.generation.generate(request, nobody)).token_ids

        async with trio.open_nursery() as nursery:
            for number in range(len(prompts)):
                nursery.start_soon(one, number)
        assert results == {n: truth.generate(p, 8) for n, p in enumerate(prompts)}


@trio_test
async def test_sampling_is_that_of_the_seed(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, ONCE) as told:
        request = ask(10, temperature=1.0, top_p=0.9, seed=7)
        result = await told.alice.generation.generate(request, nobody)
        assert result.token_ids == truth.generate(PROMPT, 10, Sampler(1.0, 0.9, 7))


@trio_test
async def test_a_worker_that_dies_in_the_middle_changes_no_token(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        came = 0

        def emit(token: Token) -> None:
            nonlocal came
            came += 1
            if came == 4:
                told.carol.network.kill()

        result = await told.alice.generation.generate(ask(), emit)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert result.stats.fetched_bytes == 0
        assert all(told.alice.peer_id not in entry.peers for entry in result.trace.values())
