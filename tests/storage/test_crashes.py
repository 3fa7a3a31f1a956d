"""Dying at every write: the store opens, is clean, and has lost nothing that was acknowledged."""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from blyan_node.testing.blocks import Author, Made
from blyan_node.testing.writing import write
from protocols import limits
from protocols.ids import BlockId
from protocols.tensors.manifest import Dtype
from storage.engine import Engine, Row
from storage.fsck import check
from storage.gc import collect, drop_body
from storage.leveldb import LevelDBEngine
from storage.memory import MemoryEngine
from storage.pins import Pin
from storage.store import Store


class Died(BaseException):
    """The process is gone."""


class Countdown:
    """Dies at the `at`-th write of all engines together, before it or right after it."""

    def __init__(self, at: int | None = None, *, after: bool = False) -> None:
        self.writes = 0
        self.last: Engine | None = None
        self.log_size = 0
        self._at = at
        self._after = after

    def wrap(self, engine: Engine, path: Path | None = None) -> Engine:
        return _Mortal(engine, self, path)

    def write(self, engine: "_Mortal", apply: Callable[[], None]) -> None:
        if self._at is not None and self.writes >= self._at:
            raise Died  # whoever goes on writing after death does not
        self.writes += 1
        dies = self.writes == self._at
        if not dies or self._after:
            if dies and engine.path is not None:
                self.last, self.log_size = engine, log_of(engine.path).stat().st_size
            apply()
        if dies:
            raise Died


class _Mortal:
    """An engine whose writes a `Countdown` counts."""

    def __init__(self, engine: Engine, countdown: Countdown, path: Path | None) -> None:
        self.engine = engine
        self.path = path
        self._countdown = countdown

    def get(self, key: bytes) -> bytes | None:
        return self.engine.get(key)

    def batch(
        self, puts: Sequence[Row], deletes: Sequence[bytes] = (), *, sync: bool = False
    ) -> None:
        self._countdown.write(self, lambda: self.engine.batch(puts, deletes, sync=sync))

    def iterate(
        self, prefix: bytes, *, start: bytes | None = None, reverse: bool = False
    ) -> Iterator[Row]:
        return self.engine.iterate(prefix, start=start, reverse=reverse)

    def close(self) -> None:
        self.engine.close()


def log_of(path: Path) -> Path:
    """The log file that LevelDB writes to now."""
    return max(path.glob("*.log"))


class Story:
    """A life of a store; `done` are the steps that were acknowledged, with what must hold."""

    def __init__(self) -> None:
        author = Author("alice")
        self.published = author.publish("tiny", ("embed", "layer0.expert0", "layer0.expert1"))
        self.update = author.update(self.published[2], b"better" * 50)
        self.second = author.publish("other", ("embed",))
        self.loose = random.Random(3).randbytes(limits.chunk_bytes + 9)
        self.done: list[Callable[[Store], None]] = []

    def tell(self, store: Store) -> None:
        """Everything in order; steps that are done already change nothing."""
        self._ingest(store, self.published[:3])
        write(store, self.published)
        self.done.append(lambda s: self._accepted(s, self.published))
        store.pin(*(made.id for made in self.published), reason=Pin.PUBLISHED)
        self.done.append(lambda s: self._pinned(s, self.published[0].id))
        write(store, [self.update])
        self.done.append(lambda s: self._accepted(s, [self.update]))
        self.done.append(self._head_is_the_update)
        with store.ingest() as ingest:
            ingest.write_tensor("loose", Dtype.U8, (len(self.loose),), [self.loose])
        collect(store)
        write(store, self.second)
        self.done.append(lambda s: self._accepted(s, self.second[:1]))
        store.unstage(store.staged(self.second[0].id))
        drop_body(store, self.second[1].id)
        collect(store)
        self.done.append(lambda s: self._gone(s, self.second[1].id))

    def _ingest(self, store: Store, made: Sequence[Made]) -> None:
        with store.ingest() as ingest:
            for one in made:
                for _, data in one.chunks:
                    ingest.write_tensor("x", Dtype.U8, (len(data),), [data])
                ingest.stage(one.block, one.manifest_id, one.manifest_bytes)
                ingest.flush()
                self.done.append(lambda s, id=one.id: self._here(s, id))

    def _here(self, store: Store, id: BlockId) -> None:
        assert store.is_stored(id)

    def _accepted(self, store: Store, made: Sequence[Made]) -> None:
        assert all(store.is_accepted(one.id) for one in made)
        if made[0] is self.published[0]:
            assert all(store.is_stored(one.id) for one in made)

    def _pinned(self, store: Store, id: BlockId) -> None:
        assert store.pins.of(id) == {Pin.PUBLISHED}

    def _head_is_the_update(self, store: Store) -> None:
        assert self.update.id in store.heads(self.published[0].id).values()

    def _gone(self, store: Store, id: BlockId) -> None:
        assert not store.is_stored(id)


def open_over(engines: Sequence[Engine], directory: Path) -> Store:
    return Store(engines[0], engines[1], directory, free_bytes=lambda: 1 << 40)


def writes_of_the_story(directory: Path) -> int:
    countdown = Countdown()
    engines = [countdown.wrap(MemoryEngine()) for _ in range(2)]
    Story().tell(open_over(engines, directory))
    return countdown.writes


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_death_at_every_write(tmp_path: Path, after: bool) -> None:
    total = writes_of_the_story(tmp_path)
    assert total > 40
    for at in range(1, total + 1):
        raw = [MemoryEngine(), MemoryEngine()]
        story = Story()
        countdown = Countdown(at, after=after)
        with contextlib.suppress(Died):
            story.tell(open_over([countdown.wrap(e) for e in raw], tmp_path))
            raise AssertionError(f"nothing was written at {at}")
        for again in (1, 2):  # it dies in the middle of recovering as well
            with contextlib.suppress(Died):
                mortal = Countdown(again, after=after)
                open_over([mortal.wrap(e) for e in raw], tmp_path)
        store = open_over(raw, tmp_path)
        assert check(store).bad == [], at
        for holds in story.done:
            holds(store)
        story.tell(store)
        assert check(store).bad == [], at
        for holds in story.done[-5:]:
            holds(store)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_torn_last_write_of_leveldb(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    at = rng.randrange(1, writes_of_the_story(tmp_path))
    countdown = Countdown(at, after=True)
    paths = [tmp_path / "index", tmp_path / "chunks"]
    raw = [LevelDBEngine(p, buffer_bytes=1 << 16, cache_bytes=1 << 16) for p in paths]
    story = Story()
    with contextlib.suppress(Died):
        story.tell(open_over([countdown.wrap(*pair) for pair in zip(raw, paths)], tmp_path))  # noqa: B905
    for engine in raw:
        engine.close()
    assert countdown.last is not None
    log = log_of(countdown.last.path)
    size = log.stat().st_size
    if countdown.log_size < size:  # LevelDB did not begin another log with this write
        cut = rng.randrange(countdown.log_size, size)
        print(f"seed {seed}: write {at}, {log.name} cut from {size} to {cut}")
        with log.open("r+b") as file:
            file.truncate(cut)
    raw = [LevelDBEngine(p, buffer_bytes=1 << 16, cache_bytes=1 << 16) for p in paths]
    store = open_over(raw, tmp_path)
    assert check(store).bad == []
    for holds in story.done:
        holds(store)
    story.tell(store)
    assert check(store).bad == []
    for engine in raw:
        engine.close()
    shutil.rmtree(tmp_path)
