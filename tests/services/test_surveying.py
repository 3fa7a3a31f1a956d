"""`--dry-run`: its numbers are those of the publish that follows, and it writes nothing."""

import shutil
from pathlib import Path

import pytest
import trio
from safetensors.torch import load_file, save_file

from blyan_node.services.authoring import Author
from blyan_node.services.chain import Chain
from blyan_node.services.publish import Publish
from blyan_node.services.surveying import Surveying
from blyan_node.testing.blocks import NOW_MS, identity
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT
from protocols.errors import ErrorCode, Refused
from storage.store import Store, open_store


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint("mixtral", tmp_path / "model", sharded=True)


def _services(store: Store, data: Path) -> tuple[Publish, Surveying]:
    limiter = trio.CapacityLimiter(1)
    chain = Chain(store, DEVELOPMENT.id, lambda: NOW_MS)
    author = Author(store, identity("alice"), DEVELOPMENT.id, lambda: NOW_MS)
    survey = Surveying(store, author.identity.public, data, limiter)
    return Publish(store, chain, author, limiter), survey


def _rows(store: Store, data: Path) -> tuple[object, ...]:
    rows = tuple(tuple(engine.iterate(b"")) for engine in (store.index.engine, store.chunks.data))
    return (*rows, store.stats(), sorted(path.name for path in data.iterdir()))


async def _both(store: Store, data: Path, model: Path) -> tuple[int, int, int, int, int]:
    """Surveys, publishes, and holds one against the other: blocks, experts, bytes, reused, new."""
    publish, surveying = _services(store, data)
    before = _rows(store, data)
    found = await surveying.survey(model, "m")
    assert _rows(store, data) == before
    stored = store.stats().chunk_bytes
    done = await publish.publish(model, "m")
    said = (found.blocks, found.experts, found.bytes)
    assert said == (done.blocks, done.experts, done.bytes)
    assert found.estimate_s > 0
    # What a release says of itself is not part of the directory.
    release = store.stats().chunk_bytes - stored - found.new_bytes
    assert 0 <= release < 10_000 and (release == 0 or done.blocks > 0)
    assert found.reused_bytes == done.reused_bytes
    if found.root is not None:
        assert (found.model, found.root) == (done.model, done.root)
    return (*said, found.reused_bytes, found.new_bytes)


@trio_test
async def test_a_new_model_an_unchanged_one_and_one_changed_expert(data: Path, model: Path) -> None:
    with open_store(data) as store:
        blocks, experts, size, reused, new = await _both(store, data, model)
        assert (blocks, reused + new) == (experts + 2 * 3 + 3 + 2, size)
        again = await _both(store, data, model)
        assert again == (0, experts, size, size, 0)
        name, shard = _expert_of(model)
        tensors = load_file(shard)
        tensors[name] = -tensors[name]
        save_file(tensors, shard)
        changed = await _both(store, data, model)
        assert changed[0] == 2 and 0 < changed[4] == size - changed[3] < size / experts


def _expert_of(model: Path) -> tuple[str, Path]:
    for shard in sorted(model.glob("*.safetensors")):
        for name in load_file(shard):
            if "layers.1" in name and "experts.2" in name:
                return name, shard
    raise AssertionError("no such expert")


@trio_test
async def test_a_publish_that_was_cut_off_is_counted_as_it_will_go_on(
    data: Path, model: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(model, half)
    with open_store(data) as store:
        publish, _ = _services(store, data)
        with trio.CancelScope() as scope:

            def stop(done: int, total: int | None, what: str) -> None:
                scope.cancel()

            await publish.publish(half, "m", stop)
        await _both(store, data, model)


@trio_test
async def test_what_does_not_fit_is_refused_before_anything_is_written(
    data: Path, model: Path
) -> None:
    with open_store(data, quota_bytes=100_000) as store:
        publish, surveying = _services(store, data)
        before = _rows(store, data)
        for refusing in (surveying.survey, publish.publish):
            with pytest.raises(Refused, match=r"nothing was written.*--disk allows") as refused:
                await refusing(model, "m")
            assert refused.value.code == ErrorCode.DISK_FULL
            assert refused.value.data["new_bytes"] > 100_000
            assert _rows(store, data) == before


@trio_test
async def test_what_is_stored_already_needs_no_room(data: Path, model: Path) -> None:
    with open_store(data) as store:
        done = await _services(store, data)[0].publish(model, "m")
    with open_store(data, quota_bytes=store.stats().chunk_bytes) as store:
        publish, surveying = _services(store, data)
        assert (await surveying.survey(model, "m")).new_bytes == 0
        assert (await publish.publish(model, "m")).root == done.root


@trio_test
async def test_it_refuses_what_a_publish_would(data: Path, model: Path) -> None:
    with open_store(data) as store:
        publish, surveying = _services(store, data)
        await publish.publish(model, "m")
        (model / "generation_config.json").write_text('{"max_new_tokens": 7}')
        before = _rows(store, data)
        for refusing in (surveying.survey, publish.publish):
            with pytest.raises(Refused, match=r"generation_config\.json"):
                await refusing(model, "m")
        (model / "config.json").unlink()
        for refusing in (surveying.survey, publish.publish):
            with pytest.raises(Refused, match=r"config\.json"):
                await refusing(model, "m")
        assert _rows(store, data) == before


@trio_test
async def test_the_sample_is_bounded(
    data: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "survey_sample_bytes", 1000)
    with open_store(data) as store:
        _, surveying = _services(store, data)
        found = await surveying.survey(model, "m")
        assert found.new_bytes > 1000 and found.estimate_s > 0
