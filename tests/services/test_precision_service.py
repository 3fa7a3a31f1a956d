"""Nodes that hold in different precisions: one answer is of one profile, and its bits say which."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import trio
from safetensors.torch import load_file

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.profile import profile
from blyan_node.moe.trunk import Trunk
from blyan_node.services.export import Export
from blyan_node.services.held import Reason
from blyan_node.testing.arithmetic import best
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.swarm import Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused
from protocols.ids import PeerId, Subject
from protocols.precision import Precision
from protocols.rpc.generate import ForwardRequest, GenerateRequest, GenerateResult, Token

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43, 38, 32, 7, 95, 2, 88, 41, 9, 71, 69]
LAYERS, EXPERTS = 3, 6
ALL = [f"layer{layer}.expert{expert}" for layer in range(LAYERS) for expert in range(EXPERTS)]
INT8, PUBLISHED = profile(best().name, "int8"), profile(best().name)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("mixtral") / "m")


Nodes = dict[str, tuple[Precision, list[str]]]
MIXED: Nodes = {
    "alice": ("int8", []), "bob": ("as-published", ALL), "carol": ("int8", ALL),
}  # fmt: skip


@asynccontextmanager
async def swarm_of(
    path: Path, tmp_path: Path, nodes: Nodes, memory: int = 1 << 30
) -> AsyncIterator[Swarm]:
    """alice is main and publishes; the others hold what is named, and she knows it."""
    swarm = Swarm(tmp_path)
    for name, (precision, _) in nodes.items():
        role, room = ("main", memory) if name == "alice" else ("gpu", 1 << 30)
        swarm.node(name, role, room, precision=precision)  # type: ignore[arg-type]
    alice = swarm.nodes["alice"]
    async with swarm.started():
        published = await alice.publish(path, "tiny")
        for name, (_, subjects) in nodes.items():
            await swarm.nodes[name].hold(published.model, subjects)
        with trio.fail_after(30):
            while len(held(alice)) != sum(len(subjects) for _, subjects in nodes.values()):
                await alice.adverts.changes.wait()
        yield swarm


def held(node: SwarmNode) -> list[PeerId]:
    return [peer for _, peers in node.adverts.directory.experts() for peer in peers]


async def ask(node: SwarmNode, precision: Precision | None = None) -> GenerateResult:
    request = GenerateRequest(
        model="tiny", prompt_ids=PROMPT, max_tokens=10, ignore_eos=True, precision=precision
    )
    return await node.generation.generate(request, nobody)


def nobody(token: Token) -> None:
    """Takes tokens and does nothing with them."""


def workers(result: GenerateResult) -> set[str]:
    return {peer for entry in result.trace.values() for peer in entry.peers}


@trio_test
async def test_a_node_that_asks_for_float32_computes_with_what_it_holds(
    mixtral: Path, tmp_path: Path
) -> None:
    """It comes to the same as what was published, so there is one copy of everything."""
    async with swarm_of(mixtral, tmp_path, {"alice": ("float32", ALL)}) as swarm:
        alice = swarm.nodes["alice"]
        result = await ask(alice)
        assert result.token_ids == open_reference(mixtral).generate(PROMPT, 10)
        assert result.profile == PUBLISHED and workers(result) == {alice.peer_id}
        assert len(alice.holding.held()) == len(ALL)
        trunks = alice.holding.memory.trunks
        assert (await ask(alice, "as-published")).token_ids == result.token_ids
        assert alice.holding.memory.trunks == trunks


@trio_test
async def test_a_swarm_at_int8_equals_the_reference_at_int8(mixtral: Path, tmp_path: Path) -> None:
    nodes: Nodes = {
        "alice": ("int8", []), "bob": ("int8", ALL[::2]), "carol": ("int8", ALL[1::2]),
    }  # fmt: skip
    truth = open_reference(mixtral, precision="int8")
    async with swarm_of(mixtral, tmp_path, nodes) as swarm:
        alice, out = swarm.nodes["alice"], tmp_path / "out.safetensors"
        request = ForwardRequest(model="tiny", prompt_ids=PROMPT, out=str(out))
        passed = await alice.generation.forward(request)
        logits, experts = truth.forward(PROMPT)
        written = load_file(out)
        assert torch.equal(written["logits"], logits)
        for layer in range(LAYERS):
            assert torch.equal(written[f"layer{layer}.experts"], experts[layer])
        result = await ask(alice)
        assert result.token_ids == truth.generate(PROMPT, 10)
        assert result.profile == passed.profile == INT8
        assert workers(result) == {swarm.nodes[name].peer_id for name in ("bob", "carol")}
        assert not torch.equal(logits, open_reference(mixtral).forward(PROMPT)[0])


@trio_test
async def test_what_was_published_can_be_demanded_among_mixed_holders(
    mixtral: Path, tmp_path: Path
) -> None:
    async with swarm_of(mixtral, tmp_path, MIXED) as swarm:
        alice, bob, carol = (swarm.nodes[name] for name in MIXED)
        plain = await ask(alice)
        assert plain.token_ids == open_reference(mixtral, precision="int8").generate(PROMPT, 10)
        assert (workers(plain), plain.profile) == ({carol.peer_id}, INT8)
        for precision in ("as-published", "float32"):
            out = tmp_path / f"{precision}.safetensors"
            request = ForwardRequest(
                model="tiny", prompt_ids=PROMPT, out=str(out), precision=precision
            )
            demanded = await alice.generation.forward(request)
            assert torch.equal(load_file(out)["logits"], open_reference(mixtral).forward(PROMPT)[0])
            traced = {peer for entry in demanded.trace.values() for peer in entry.peers}
            assert (traced, demanded.profile) == ({bob.peer_id}, PUBLISHED)


@trio_test
async def test_a_dead_holder_is_not_replaced_by_one_of_another_precision(
    mixtral: Path, tmp_path: Path
) -> None:
    async with swarm_of(mixtral, tmp_path, MIXED) as swarm:
        alice, bob, carol = (swarm.nodes[name] for name in MIXED)
        carol.kill()
        result = await ask(alice)
        assert result.token_ids == open_reference(mixtral, precision="int8").generate(PROMPT, 10)
        assert bob.peer_id not in workers(result) and alice.peer_id in workers(result)
        loaded = alice.holding.held()
        assert {(one.precision, one.reason) for one in loaded} == {("int8", Reason.PASSING)}


@trio_test
async def test_without_a_holder_the_main_node_computes_what_is_demanded_itself(
    mixtral: Path, tmp_path: Path
) -> None:
    nodes: Nodes = {"alice": ("int8", ALL), "carol": ("int8", ALL)}
    async with swarm_of(mixtral, tmp_path, nodes) as swarm:
        alice = swarm.nodes["alice"]
        result = await ask(alice, "as-published")
        assert result.token_ids == open_reference(mixtral).generate(PROMPT, 10)
        assert (workers(result), result.profile) == ({alice.peer_id}, PUBLISHED)
        assert {h.precision for h in alice.holding.held()} == {"int8", "as-published"}
        assert len(alice.holding.advertised()) == len(ALL)  # what was loaded for it is not offered
        again = await ask(alice)
        assert again.token_ids == open_reference(mixtral, precision="int8").generate(PROMPT, 10)


@pytest.mark.slow
@trio_test
async def test_what_is_demanded_and_nobody_can_compute_is_refused_by_name(
    mixtral: Path, tmp_path: Path
) -> None:
    nodes: Nodes = {"alice": ("int8", []), "carol": ("int8", ALL)}
    checkpoint = Checkpoint.open(mixtral)
    trunk = Trunk(checkpoint.config, checkpoint.load, best())
    memory = trunk.bytes + trunk.cache_bytes(len(PROMPT) + 10) + 4 * 3 * 40 * 56 - 1
    async with swarm_of(mixtral, tmp_path, nodes, memory) as swarm:
        alice = swarm.nodes["alice"]
        assert (await ask(alice)).profile == INT8
        with pytest.raises(Refused, match=f"every holder of the profile {PUBLISHED} is gone") as no:
            await ask(alice, "as-published")
        assert no.value.code == ErrorCode.EXPERT_UNAVAILABLE
        assert str(no.value.data["expert"]).startswith("layer0.expert")


@trio_test
async def test_a_converted_expert_takes_its_own_bytes_and_no_pack_file(
    mixtral: Path, tmp_path: Path
) -> None:
    nodes: Nodes = {"alice": ("as-published", []), "bob": ("int8", ALL[:4])}
    async with swarm_of(mixtral, tmp_path, nodes) as swarm:
        bob = swarm.nodes["bob"]
        memory, matrices = bob.holding.memory, 3 * 40 * 56
        scales = 4 * (56 + 56 + 40)
        assert {one.bytes for one in bob.holding.held()} == {matrices + scales}
        assert {one.expert.storage for one in bob.holding.held()} == {"int8"}
        assert memory.experts == memory.copied == 4 * (matrices + scales)
        assert bob.store.packs.bytes == 0
        (block, *_) = (one.what.block for one in bob.holding.held())
        size = bob.store.body(block)[1].size
        assert bob.holding.size_of(block) == matrices + 4 * (56 + 56 + 56) < size / 3
        await bob.holding.load(block, precision="as-published")
        assert (bob.store.packs.bytes > 0, memory.experts) == (
            True, 4 * (matrices + scales) + size,
        )  # fmt: skip
        await bob.holding.drop(block)
        assert bob.store.packs.bytes > 0  # the other one is used where it lies
        assert memory.experts == 3 * (matrices + scales) + size
        memory.make_room(memory.free + size, max(memory._lenders))
        await bob.holding.clear()
        assert (bob.store.packs.bytes, memory.experts) == (0, 3 * (matrices + scales))


@trio_test
async def test_holding_in_another_precision_changes_no_published_byte(
    mixtral: Path, tmp_path: Path
) -> None:
    async with swarm_of(mixtral, tmp_path, {"alice": ("int8", ALL)}) as swarm:
        alice = swarm.nodes["alice"]
        await ask(alice)
        export = Export(alice.store, alice.supply, trio.CapacityLimiter(1))
        await export.export(alice.chain.find_model("tiny").id, tmp_path / "out")
        assert _tensors(tmp_path / "out") == _tensors(mixtral)
        assert set(alice.store.heads(alice.chain.find_model("tiny").id)) >= set(map(Subject, ALL))


def _tensors(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        name: (str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes())
        for file in path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
