"""Answers of a swarm equal those of the single-process reference, whatever happens on the way."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import trio
from safetensors.torch import load_file, save_file

from blyan_node.moe.reference import Reference
from blyan_node.moe.sampling import Sampler, Sampling
from blyan_node.network.interface import Handler
from blyan_node.services.changes import Changes
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import local_tensors, open_reference
from blyan_node.testing.swarm import Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.forward.messages import PROTOCOL, Activated
from protocols.ids import BlockId, PeerId, Subject, cid_text
from protocols.rpc.generate import ForwardRequest, GenerateRequest, Token
from protocols.wire import Messages
from storage.gc import drop_body

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
        await told.alice.sees(sum(map(len, holds.values())))
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
            assert entry.block == cid_text(heads[Subject(subject)])
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
        assert result.token_ids == truth.generate(PROMPT, 10, Sampler(Sampling(1.0, top_p=0.9), 7))


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


@trio_test
async def test_without_another_holder_the_expert_is_loaded_and_computed_here(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, ONCE) as told:
        came = 0

        def emit(token: Token) -> None:
            nonlocal came
            came += 1
            if came == 4:
                told.carol.network.kill()

        result = await told.alice.generation.generate(ask(), emit)
        assert result.token_ids == truth.generate(PROMPT, 12)
        here = {s for s, entry in result.trace.items() if told.alice.peer_id in entry.peers}
        assert here and here <= set(ONCE["carol"])
        assert told.alice.holding.advertised() == []
        assert len(told.alice.holding.held()) == len(here)


@trio_test
async def test_an_expert_that_is_only_stored_elsewhere_is_fetched(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    holds = {"bob": [s for s in ALL if not s.startswith("layer1.")]}
    async with story(mixtral, tmp_path, holds) as told:
        result = await told.dave.generation.generate(ask(), nobody)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert told.dave.fetch.copied == result.stats.fetched_bytes > 0
        again = await told.dave.generation.generate(ask(), nobody)
        assert again.token_ids == result.token_ids
        assert again.stats.fetched_bytes == 0
        layer1 = {s for s in result.trace if s.startswith("layer1.")}
        read = told.dave.store.reads
        heads = told.dave.store.heads(told.model)
        for subject in ALL:
            assert read[heads[Subject(subject)]] == (1 if subject in layer1 else 0)


@trio_test
async def test_an_expert_that_is_nowhere_is_named(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.limits.holder_wait_s_max", 0.2)
    holds = {"bob": [s for s in ALL if s != "layer2.expert3"]}
    async with story(mixtral, tmp_path, holds) as told:
        block = told.alice.store.heads(told.model)[Subject("layer2.expert3")]
        drop_body(told.alice.store, block)
        with pytest.raises(Refused, match=r"layer2\.expert3 is not available") as refused:
            await told.alice.generation.generate(ask(), nobody)
        assert refused.value.code is ErrorCode.EXPERT_UNAVAILABLE
        assert refused.value.data == {"expert": "layer2.expert3", "block": cid_text(block)}
        assert told.alice.generation.running == 0


def session_bytes(node: SwarmNode, model: BlockId, new_tokens: int) -> int:
    """What a trunk of three layers takes, and the cache of one answer; too little for an expert."""
    heads = node.store.heads(model).items()
    trunk = sum(node.holding.size_of(block) for name, block in heads if "expert" not in name)
    return trunk + LAYERS * 2 * 2 * 16 * 4 * (len(PROMPT) + new_tokens)


@trio_test
async def test_an_expert_that_does_not_fit_is_named(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.limits.holder_wait_s_max", 0.2)
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    async with swarm.started():
        published = await alice.publish(mixtral, "tiny")
        alice.holding.memory.budget = session_bytes(alice, published.model, 12)
        with pytest.raises(Refused, match=r"the expert does not fit") as refused:
            await alice.generation.generate(ask(), nobody)
        assert refused.value.code is ErrorCode.EXPERT_UNAVAILABLE


@trio_test
async def test_memory_bounds_what_is_loaded_in_passing(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    swarm = Swarm(tmp_path)
    one = 4 * 3 * 40 * 56
    alice = swarm.node("alice", "main")
    async with swarm.started():
        await alice.publish(mixtral, "tiny")
        alice.holding.memory.budget = 5 * one + 200_000  # five experts beside the trunk
        result = await alice.generation.generate(ask(4), nobody)
        assert result.token_ids == truth.generate(PROMPT, 4)
        memory = alice.holding.memory
        assert memory.experts == one * len(alice.holding.held())
        assert memory.experts + memory.trunks <= memory.budget and memory.caches == 0
        packs = sum(pack.stat().st_size for pack in (tmp_path / "alice" / "packs").iterdir())
        assert alice.store.packs.bytes == packs < 1.1 * (memory.experts + memory.trunks)


@trio_test
async def test_kept_experts_compute_here(mixtral: Path, truth: Reference, tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    async with swarm.started():
        published = await alice.publish(mixtral, "tiny")
        await alice.hold(published.model, ALL)
        result = await alice.generation.generate(ask(), nobody)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert result.stats.remote_calls == 0
        assert all(set(entry.peers) == {alice.peer_id} for entry in result.trace.values())


@trio_test
async def test_a_busy_worker_is_passed_over(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        told.bob.serving._queue_max = 0
        result = await told.alice.generation.generate(ask(), nobody)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert all(told.bob.peer_id not in entry.peers for entry in result.trace.values())
        assert result.stats.retries >= told.bob.serving.busy > 0


def answers_of(node: SwarmNode) -> tuple[Messages, Handler]:
    return node.network.calls.handlers[PROTOCOL]


def liar(node: SwarmNode, twist: Callable[[bytes], bytes]) -> None:
    """Makes a node twist the rows that it computes."""
    messages, honest = answers_of(node)

    async def lie(peer: PeerId, message: object) -> object:
        reply = await honest(peer, message)
        return Activated(twist(reply.data)) if isinstance(reply, Activated) else reply

    node.network.calls.handlers[PROTOCOL] = (messages, lie)


NAN = np.array([np.nan], "<f4").tobytes()


@pytest.mark.parametrize(
    "twist",
    [
        pytest.param(lambda data: data[:-4], id="too short"),
        pytest.param(lambda data: data + data, id="too many rows"),
        pytest.param(lambda data: NAN + data[4:], id="not a number"),
        pytest.param(lambda data: b"", id="nothing"),
    ],
)
@trio_test
async def test_a_lying_worker_costs_itself_and_nothing_else(
    twist: Callable[[bytes], bytes], mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        liar(told.bob, twist)
        result = await told.alice.generation.generate(ask(), nobody)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert all(told.bob.peer_id not in entry.peers for entry in result.trace.values())
        assert told.alice.network.counters.penalties > 0
        assert result.stats.retries >= told.alice.network.counters.penalties


@trio_test
async def test_a_hung_worker_is_hedged_and_then_avoided(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        messages, _ = answers_of(told.bob)

        async def hang(peer: PeerId, message: object) -> object:
            await trio.sleep_forever()
            raise AssertionError

        told.bob.network.calls.handlers[PROTOCOL] = (messages, hang)
        result = await told.alice.generation.generate(ask(), nobody)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert 0 < result.stats.retries < 10
        assert told.alice.layers.links.link(told.bob.peer_id).rows_in_flight == 0


@trio_test
async def test_an_expert_that_is_dropped_on_the_way_is_found_elsewhere(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        heads = told.alice.store.heads(told.model)
        adverts = told.bob.adverts
        told.bob.holding.changes = Changes()  # alice is not told
        for subject in TWICE["bob"]:
            await told.bob.holding.drop(heads[Subject(subject)])
        assert adverts.config.role == "gpu"
        result = await told.alice.generation.generate(ask(), nobody)
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert all(told.bob.peer_id not in entry.peers for entry in result.trace.values())
        known = told.alice.adverts.directory.holders
        denied = [s for s in TWICE["bob"] if told.bob.peer_id not in known(heads[Subject(s)])]
        assert denied and told.bob.serving.requests <= len(denied)


@trio_test
async def test_cancelling_ends_with_what_there_is_and_frees_everything(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        cancelled = trio.Event()
        tokens: list[int] = []

        def emit(token: Token) -> None:
            tokens.append(token.token_id)
            if len(tokens) == 3:
                cancelled.set()

        result = await told.alice.generation.generate(ask(1000), emit, cancelled=cancelled)
        assert result.finish == "cancelled"
        assert result.token_ids == tokens == truth.generate(PROMPT, len(tokens))
        assert len(tokens) < 1000
        assert told.alice.generation.running == 0
        links = told.alice.layers.links
        for node in (told.bob, told.carol, told.dave):
            assert links.link(node.peer_id).rows_in_flight == 0
            assert node.serving.queue_length == 0


@trio_test
async def test_an_answer_begins_when_the_model_is_loaded(
    mixtral: Path, truth: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        begun: list[bool] = []

        async def hang(*_: object) -> int:
            await trio.sleep_forever()
            return 0

        async def answer() -> None:
            result = await told.alice.generation.generate(
                ask(), nobody, cancelled=trio.Event(), on_begin=lambda: begun.append(True)
            )
            assert result.token_ids == truth.generate(PROMPT, 12)

        monkeypatch.setattr(told.alice.supply, "ensure", hang)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            while not told.alice.generation.running:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert not begun and told.alice.generation.running == 0
        monkeypatch.undo()
        await answer()
        assert begun == [True]


@trio_test
async def test_trunks_that_nobody_uses_leave_when_room_is_needed(
    mixtral: Path, gpt_oss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "holder_wait_s_max", 0)
    async with story(mixtral, tmp_path, TWICE) as told:
        alice = told.alice
        other = await alice.publish(gpt_oss, "other")
        await alice.generation.generate(ask(1), nobody)
        first = alice.holding.memory.trunks
        alice.holding.memory.budget = session_bytes(alice, other.model, 1)
        request = ask(1, model="other")
        with pytest.raises(Refused, match="not available"):  # nobody holds it, nor is there room
            await alice.generation.generate(request, nobody)
        [only] = alice.trunks._loaded.values()
        assert alice.holding.memory.trunks == only.trunk.bytes != first
        assert alice.store.packs.bytes < 1.1 * only.trunk.bytes  # those of the first are gone


@trio_test
async def test_a_refusal_is_not_wrapped_when_it_can_be_cancelled(
    mixtral: Path, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, {"bob": ["layer0.expert0"]}) as told:
        request = ask(prompt_ids=[96, 97])
        with pytest.raises(Refused, match="token id 97") as refused:
            await told.alice.generation.generate(request, nobody, cancelled=trio.Event())
        assert refused.value.code is ErrorCode.BAD_INPUT


@trio_test
async def test_stop_tokens_end_the_answer_unless_ignored(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    long = truth.generate(PROMPT, 12)
    path = make_checkpoint("mixtral", tmp_path / "m", eos_token_id=long[5])
    swarm = Swarm(tmp_path / "nodes")
    alice = swarm.node("alice", "main")
    async with swarm.started():
        await alice.publish(path, "tiny")
        result = await alice.generation.generate(ask(ignore_eos=False), nobody)
        assert result.finish == "stop"
        assert result.token_ids == long[: long.index(long[5]) + 1]
        assert (await alice.generation.generate(ask(), nobody)).token_ids == long


@trio_test
async def test_an_answer_ends_where_the_model_reads_no_more(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    most = len(PROMPT) + 5
    path = make_checkpoint("mixtral", tmp_path / "m", max_position_embeddings=most)
    swarm = Swarm(tmp_path / "nodes")
    alice = swarm.node("alice", "main")
    async with swarm.started():
        await alice.publish(path, "tiny")
        result = await alice.generation.generate(ask(12), nobody)
        assert (result.finish, result.token_ids) == ("length", truth.generate(PROMPT, 5))
        for tokens in (most, most + 1):
            long = [3] * tokens
            with pytest.raises(Refused, match=f"has {tokens} tokens, and the model reads {most}"):
                await alice.generation.generate(ask(1, prompt_ids=long), nobody)
        out = str(tmp_path / "pass")
        with pytest.raises(Refused, match="too long for tiny"):
            await alice.generation.forward(
                ForwardRequest(model="tiny", prompt_ids=[3] * (most + 1), out=out)
            )
        done = await alice.generation.forward(
            ForwardRequest(model="tiny", prompt_ids=[3] * most, out=out)
        )
        assert done.out == out
        assert alice.holding.memory.caches == 0


@trio_test
async def test_text_streams_in_pieces_that_make_the_whole(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "m", tokenizer=True)
    swarm = Swarm(tmp_path / "nodes")
    alice = swarm.node("alice", "main")
    async with swarm.started():
        await alice.publish(path, "tiny")
        tokens: list[Token] = []
        request = ask(20, prompt_ids=None, prompt="Hällo", chat=True)
        result = await alice.generation.generate(request, tokens.append)
        assert result.text is not None
        assert result.text == "".join(token.text or "" for token in tokens)
        assert [token.token_id for token in tokens] == result.token_ids


@trio_test
async def test_a_model_without_tokenizer_takes_ids_only(mixtral: Path, tmp_path: Path) -> None:
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    async with swarm.started():
        await alice.publish(mixtral, "tiny")
        with pytest.raises(Refused, match="token ids only"):
            await alice.generation.generate(ask(prompt_ids=None, prompt="hi"), nobody)


@trio_test
async def test_a_second_main_node_answers_at_its_first_request(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        progress: list[tuple[int, int | None, str]] = []
        result = await told.bob.generation.generate(
            ask(), nobody, progress=lambda *told: progress.append(told)
        )
        assert result.token_ids == truth.generate(PROMPT, 12)
        assert result.stats.fetched_bytes > 0
        assert progress


@trio_test
async def test_an_update_is_for_new_sessions_and_the_old_root_still_answers(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    async with story(mixtral, tmp_path, TWICE) as told:
        first = await told.alice.generation.generate(ask(), nobody)
        subject = Subject(max(first.trace, key=lambda s: sum(first.trace[s].peers.values())))
        other = open_reference(mixtral)
        weights = {name: tensor * 1.5 for name, tensor in other.parts[subject].items()}
        other.parts[subject] = weights
        named = local_tensors(mixtral, subject)
        save_file({name: t * 1.5 for name, t in named.items()}, tmp_path / "new.safetensors")
        came = 0

        async with trio.open_nursery() as nursery:

            def emit(token: Token) -> None:
                nonlocal came
                came += 1
                if came == 2:
                    nursery.start_soon(
                        told.alice.update, told.model, subject, tmp_path / "new.safetensors"
                    )

            running = await told.alice.generation.generate(ask(40), emit)
        assert running.token_ids == truth.generate(PROMPT, 40)
        assert running.root == first.root
        new = await told.alice.generation.generate(ask(), nobody)
        assert new.token_ids == other.generate(PROMPT, 12)
        assert new.root != first.root
        assert new.trace[subject].block != first.trace[subject].block
        old = await told.alice.generation.generate(ask(root=first.root), nobody)
        assert (old.token_ids, old.root) == (first.token_ids, first.root)
        assert old.trace[subject].block == first.trace[subject].block
        assert len(told.alice.trunks._loaded) == 1  # an expert's update shares the trunk
        with pytest.raises(Refused, match="has no root"):
            await told.alice.generation.generate(ask(root="0" * 64), nobody)


@trio_test
async def test_a_holder_that_comes_in_time_is_waited_for(
    mixtral: Path, truth: Reference, tmp_path: Path
) -> None:
    swarm = Swarm(tmp_path)
    alice, bob = swarm.node("alice", "main"), swarm.node("bob")
    async with swarm.started() as nursery:
        published = await alice.publish(mixtral, "tiny")
        alice.holding.memory.budget = session_bytes(alice, published.model, 4)
        nursery.start_soon(bob.hold, published.model, ALL)
        result = await alice.generation.generate(ask(4), nobody)
        assert result.token_ids == truth.generate(PROMPT, 4)
        assert all(set(entry.peers) == {bob.peer_id} for entry in result.trace.values())
