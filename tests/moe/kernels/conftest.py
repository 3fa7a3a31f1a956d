"""The kernels of every target that this machine can run, compiled once for all tests."""

from pathlib import Path

import pytest

from blyan_node.moe.kernels.library import Kernels, load
from blyan_node.moe.kernels.targets import Target, Unsupported, runnable

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every kernel of every target, many cases of each: `make quick` leaves this folder out."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.slow)


def _targets() -> list[Target]:
    try:
        return runnable()
    except Unsupported:
        return []


@pytest.fixture(scope="session")
def objects_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests keep machine code."""
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="session")
def every_kernels(objects_folder: Path) -> list[Kernels]:
    """One of each target that runs here."""
    if not _targets():
        pytest.skip("this processor has no fused multiply-add")
    return [load(objects_folder, target) for target in _targets()]


@pytest.fixture(params=[target.name for target in _targets()] or ["none"])
def kernels(request: pytest.FixtureRequest, every_kernels: list[Kernels]) -> Kernels:
    """Each of them in turn."""
    return next(k for k in every_kernels if k.target.name == request.param)
