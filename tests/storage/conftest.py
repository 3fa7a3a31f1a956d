"""Stores on each engine, and the wrapper that dies at a chosen write."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storage.engine import Engine
from storage.leveldb import LevelDBEngine
from storage.memory import MemoryEngine
from storage.store import Store

MakeEngine = Callable[[str], Engine]


@pytest.fixture(params=["leveldb", "memory"])
def make_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeEngine]:
    """Makes an engine by name; a name used twice gives the same content again."""
    opened: dict[str, Engine] = {}

    def make(name: str) -> Engine:
        if request.param == "memory":
            return opened.setdefault(name, MemoryEngine())
        if name in opened:
            opened[name].close()
        opened[name] = LevelDBEngine(tmp_path / name, buffer_bytes=1 << 20, cache_bytes=1 << 20)
        return opened[name]

    yield make
    for engine in opened.values():
        engine.close()


@pytest.fixture
def make_store(make_engine: MakeEngine, tmp_path: Path) -> Callable[..., Store]:
    """Opens the one store of a test; called again it opens what the first one left."""

    def make(**options: object) -> Store:
        directory = tmp_path / "data"
        directory.mkdir(exist_ok=True)
        return Store(make_engine("index"), make_engine("chunks"), directory, **options)  # type: ignore[arg-type]

    return make
