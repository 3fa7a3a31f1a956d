"""Nodes share a model out among themselves, and fill the gap when one of them is lost."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from safetensors.torch import save_file

from blyan_node.services.held import Reason
from blyan_node.services.placement import Placement, PlacementConfig
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import local_tensors
from blyan_node.testing.swarm import Swarm, SwarmNode
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, Subject, cid_text
from storage.pins import Pin

LAYERS, EXPERTS = 2, 4
ONE = 4 * 3 * 40 * 56  # bytes of an expert
AUTO = PlacementConfig("auto", replicas=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral") / "m"
    return make_checkpoint("mixtral", path, num_hidden_layers=LAYERS, num_local_experts=EXPERTS)


def placement(node: SwarmNode, config: PlacementConfig = AUTO) -> Placement:
    return Placement(
        config, node.chain, node.store, node.supply, node.adverts, node.holding, node.peer_id
    )


class Placed:
    """Alice publishes; the gpu nodes plan in rounds, as their loops would."""

    def __init__(self, swarm: Swarm, model: BlockId, plans: dict[str, Placement]) -> None:
        self.swarm = swarm
        self.model = model
        self.plans = plans
        self.experts = sorted(
            block
            for subject, block in swarm.nodes["alice"].store.heads(model).items()
            if ".expert" in subject
        )

    async def rounds(self, count: int) -> None:
        """Every node plans and acts `count` times; adverts travel in between."""
        for _ in range(count):
            for plan in list(self.plans.values()):
                await plan.round()
            await self.adverts_travel()

    async def adverts_travel(self) -> None:
        """Until everybody's view is what everybody holds."""
        nodes = self.swarm.running.values()

        def fresh() -> bool:
            return all(
                {h.block for h in advert.held()} == {h.block for h in other.holding.advertised()}
                for node in nodes
                for other in nodes
                if (advert := node.adverts.directory.advert(other.peer_id)) is not None
            )

        with trio.fail_after(20):
            while not fresh():
                await trio.sleep(0.05)

    def counts(self) -> list[int]:
        held = [
            {h.block for h in node.holding.advertised()} for node in self.swarm.running.values()
        ]
        return [sum(block in blocks for blocks in held) for block in self.experts]


@asynccontextmanager
async def placed(tiny: Path, tmp_path: Path, memory: int, *names: str) -> AsyncIterator[Placed]:
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main")
    for name in names:
        swarm.node(name, memory=memory, auto=True)
    async with swarm.started():
        published = await alice.publish(tiny, "tiny")
        plans = {name: placement(swarm.nodes[name]) for name in names}
        yield Placed(swarm, published.model, plans)


@trio_test
async def test_three_nodes_reach_two_replicas_and_stay_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with placed(tiny, tmp_path, 100 * ONE, "bob", "carol", "dave") as story:
        await story.rounds(3)
        assert min(story.counts()) == 1  # the first replica at once, the second after a while
        monkeypatch.setattr("protocols.limits.placement_deficit_s", 0.0)
        await story.rounds(6)
        assert story.counts() == [2] * LAYERS * EXPERTS
        alice = placement(story.swarm.nodes["alice"], PlacementConfig("none", replicas=2))
        assert alice.replicas(story.model) == 2
        assert await alice.wait_replicas(story.model, 2) == 2
        assert not await alice.round()
        await story.rounds(2)
        assert story.counts() == [2] * LAYERS * EXPERTS


@trio_test
async def test_a_lost_nodes_experts_are_taken_by_the_others(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.limits.placement_deficit_s", 0.0)
    async with placed(tiny, tmp_path, 100 * ONE, "bob", "carol", "dave") as story:
        await story.rounds(8)
        assert story.counts() == [2] * LAYERS * EXPERTS
        story.swarm.nodes["carol"].kill()
        del story.plans["carol"]
        with trio.fail_after(20):
            while len(story.swarm.running) > 3:
                await trio.sleep(0.01)
        await story.rounds(6)
        assert story.counts() == [2] * LAYERS * EXPERTS


@trio_test
async def test_nobody_takes_more_than_its_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocols.limits.placement_deficit_s", 0.0)
    async with placed(tiny, tmp_path, 5 * ONE, "bob", "carol") as story:
        await story.rounds(8)
        assert sorted(story.counts()) == [1] * 6 + [2] * 2
        for name in ("bob", "carol"):
            assert story.swarm.nodes[name].holding.memory.experts == 5 * ONE


@trio_test
async def test_what_was_held_before_a_restart_is_loaded_first(tiny: Path, tmp_path: Path) -> None:
    async with placed(tiny, tmp_path, 100 * ONE, "bob", "carol") as story:
        bob = story.swarm.nodes["bob"]
        await bob.supply.ensure(story.experts[:3])
        bob.store.pin(*story.experts[:3], reason=Pin.HELD)
        fetched = bob.fetch.copied
        async with trio.open_nursery() as nursery:
            await nursery.start(story.plans["bob"].run)
            with trio.fail_after(20):
                while len(bob.holding.held()) < 3:
                    await trio.sleep(0.01)
            assert {h.what.block for h in bob.holding.held()[:3]} == set(story.experts[:3])
            nursery.cancel_scope.cancel()
        assert fetched > 0


@trio_test
async def test_a_list_is_held_by_order_and_of_every_model(tiny: Path, tmp_path: Path) -> None:
    async with placed(tiny, tmp_path, 100 * ONE, "bob") as story:
        bob = story.swarm.nodes["bob"]
        subjects = frozenset({Subject("layer0.expert1"), Subject("layer1.expert3")})
        listed = placement(bob, PlacementConfig("list", 2, subjects))
        await listed.round()
        heads = bob.store.heads(story.model)
        assert {h.what.block for h in bob.holding.held()} == {heads[s] for s in subjects}
        assert all(h.reason is Reason.ORDER for h in bob.holding.held())
        assert not await listed.round()


@trio_test
async def test_the_last_copy_is_dropped_only_by_force(tiny: Path, tmp_path: Path) -> None:
    async with placed(tiny, tmp_path, 100 * ONE, "bob", "carol") as story:
        bob, carol = story.plans["bob"], story.plans["carol"]
        block = story.experts[0]
        known = bob._store.block(block)
        subject = known and known.header.subject
        await bob.hold([block])
        await story.adverts_travel()
        with pytest.raises(Refused, match="nobody else holds") as refused:
            await bob.drop([block])
        assert refused.value.code is ErrorCode.LAST_COPY
        assert refused.value.data == {"expert": subject, "block": cid_text(block)}
        await carol.hold([block])
        await story.adverts_travel()
        await bob.drop([block])
        await story.adverts_travel()
        assert story.counts()[0] == 1
        await carol.drop([block], force=True)
        assert story.counts()[0] == 0
        with pytest.raises(Refused, match="not held here"):
            await carol.drop([block], force=True)


@trio_test
async def test_what_does_not_fit_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    async with placed(tiny, tmp_path, ONE, "bob") as story:
        bob = story.plans["bob"]
        await bob.hold(story.experts[:1])
        with pytest.raises(Refused, match="does not fit into this node's memory"):
            await bob.hold(story.experts[:2])


@trio_test
async def test_a_model_that_may_not_be_taken_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    async with placed(tiny, tmp_path, 100 * ONE, "bob") as story:
        bob = story.swarm.nodes["bob"]
        picky = PlacementConfig("auto", 2, may_take=lambda model: False)
        assert not await placement(bob, picky).round()
        assert bob.holding.held() == ()


@trio_test
async def test_what_is_held_follows_its_subject_to_a_new_head(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with placed(tiny, tmp_path, 100 * ONE, "bob", "carol") as story:
        alice, bob, carol = (story.swarm.nodes[name] for name in ("alice", "bob", "carol"))
        subject = Subject("layer0.expert1")
        old = alice.store.heads(story.model)[subject]
        await story.plans["bob"].hold([old])
        await carol.holding.keep(old, Reason.PLACEMENT)
        parts = local_tensors(tiny, subject)
        save_file({name: -tensor for name, tensor in parts.items()}, tmp_path / "new.safetensors")
        new = (await alice.update(story.model, subject, tmp_path / "new.safetensors")).block
        lists = [placement(node, PlacementConfig("none", 2)) for node in (bob, carol)]
        for each in lists:
            await each.round()
        assert bob.holding.keeps(new) and bob.holding.keeps(old)
        assert not carol.holding.keeps(new) and carol.holding.keeps(old)
        for asked in (1, 0):
            since, held = lists[1]._superseded[old][0], carol.holding.get(old)
            assert held is not None
            held.calls += asked
            await lists[1].round()
            assert (lists[1]._superseded[old][0] > since) == bool(asked)
        monkeypatch.setattr("protocols.limits.placement_superseded_s", 0.0)
        for each in lists:
            await each.round()
        assert bob.holding.keeps(new) and not bob.holding.keeps(old)
        assert not carol.holding.keeps(old)
        assert Pin.HELD not in carol.store.pins.of(old)
