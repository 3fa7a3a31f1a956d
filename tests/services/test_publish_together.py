"""Several publishes on one node at once: one after the other, and no room is promised twice."""

from pathlib import Path

import pytest
import trio

from blyan_node.services import watched
from blyan_node.services.publish import Publish, Published
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.publishing import publishing
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused
from storage.fsck import check
from storage.store import Store, open_store


@pytest.fixture
def store(tmp_path: Path):
    with open_store(tmp_path / "home" / "data") as store:
        yield store


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two models without a byte in common."""
    folder = tmp_path_factory.mktemp("models")
    one = make_checkpoint("mixtral", folder / "one")
    two = make_checkpoint("mixtral", folder / "two", seed=1, num_experts_per_tok=3)
    (two / "generation_config.json").unlink()
    return {"one": one, "two": two}


async def together(publish: Publish, asked: list[tuple[str, Path]]) -> list[Published | Refused]:
    """What became of each, in the order in which they were asked."""
    found: dict[int, Published | Refused] = {}

    async def ask(number: int, name: str, path: Path) -> None:
        try:
            found[number] = await publish.publish(path, name)
        except Refused as refused:
            found[number] = refused

    async with trio.open_nursery() as nursery:
        for number, (name, path) in enumerate(asked):
            nursery.start_soon(ask, number, name, path)
    return [found[number] for number in range(len(asked))]


def seqs(store: Store, done: Published) -> list[int]:
    """The numbers that the author gave to the blocks of a model."""
    ids = [done.model, *store.heads(done.model).values(), *store.releases(done.model)]
    return [block.header.seq for id in ids if (block := store.block(id)) is not None]


@trio_test
async def test_one_model_twice_is_published_once(store, models) -> None:
    done = await together(publishing(store), [("one", models["one"])] * 3)
    assert sorted(found.blocks > 0 for found in done) == [False, False, True]
    assert len({(found.model, found.root) for found in done}) == 1
    assert sum(found.reused_bytes == found.bytes for found in done) == 2
    assert len(list(store.models())) == 1 and check(store).ok


@trio_test
async def test_two_models_and_two_names_of_one(store, models) -> None:
    publish = publishing(store)
    one, _, again = done = await together(
        publish, [("one", models["one"]), ("two", models["two"]), ("again", models["one"])]
    )
    assert len({found.model for found in done}) == 3
    assert {found.model for found in done} == set(store.models())
    assert one.reused_bytes + again.reused_bytes == one.bytes, "each of its bytes once"
    used = [seq for found in done for seq in seqs(store, found)]
    assert len(set(used)) == len(used), "no number of the author is used twice"
    assert store.stats().staged == 0 and check(store).ok


@trio_test
async def test_room_for_one_of_two(store, models) -> None:
    """Whichever comes second is refused with the numbers, and what it would store is not there."""
    publish = publishing(store)
    needs = {name: (await publish.rehearse(models[name], name)).new_bytes for name in models}
    store.chunks.quota_bytes = max(needs.values()) + min(needs.values()) - 1
    done = await together(publish, [*models.items()])
    (first,) = (found for found in done if isinstance(found, Published))
    (refused,) = (found for found in done if isinstance(found, Refused))
    assert refused.code is ErrorCode.DISK_FULL and "--disk allows" in refused.why
    second = refused.data["name"]
    assert refused.data["new_bytes"] == needs[second] == refused.data["room_bytes"] + 1
    assert store.stats().chunk_bytes == needs[first.name]
    assert list(store.models()) == [first.model] and check(store).ok
    store.chunks.quota_bytes += 1
    assert (await publish.publish(models[second], second)).reused_bytes == 0
    assert store.stats().chunk_bytes == sum(needs.values()) == store.chunks.quota_bytes


@trio_test
async def test_a_dry_run_beside_a_publish(store, models, monkeypatch) -> None:
    """It says what is so at its time, and takes nothing from the publish."""
    monkeypatch.setattr(watched, "PROGRESS_BYTES", 1_000)
    publish, half = publishing(store), trio.Event()
    said = []

    def told(done: int, total: int | None, what: str) -> None:
        if done > (total or 0) / 2:
            half.set()

    async def rehearse() -> None:
        await half.wait()
        said.append(await publish.rehearse(models["one"], "one"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rehearse)
        done = await publish.publish(models["one"], "one", told)
    assert 0 <= said[0].reused_bytes <= done.bytes == said[0].bytes
    assert done.reused_bytes == 0 and check(store).ok
    assert (await publish.rehearse(models["one"], "one")).blocks == 0


@trio_test
async def test_one_that_waits_is_cancelled(store, models, monkeypatch) -> None:
    """The one that runs does not notice, and the next one has its turn."""
    monkeypatch.setattr(watched, "PROGRESS_BYTES", 1_000)
    publish = publishing(store)
    async with trio.open_nursery() as nursery:
        waiting = trio.CancelScope()

        async def wait() -> None:
            with waiting:
                await publish.publish(models["two"], "two")

        async def first() -> None:
            await publish.publish(models["one"], "one", lambda *a: waiting.cancel())

        nursery.start_soon(first)
        while not publish._author.turn.locked():
            await trio.sleep(0)
        nursery.start_soon(wait)
    assert waiting.cancelled_caught and len(list(store.models())) == 1
    assert (await publish.publish(models["two"], "two")).reused_bytes == 0
    assert check(store).ok
