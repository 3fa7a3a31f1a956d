"""Testnets for the tests that use real daemons."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blyan_node.testing.daemons import Testnet, alive

HERE = Path(__file__).parent


@pytest.fixture
def make_testnet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Testnet]]:
    """Starts testnets with `make_testnet(nodes, *options)`; all are gone when the test ends."""
    started: list[Testnet] = []

    def make(nodes: int, *options: object) -> Testnet:
        net = Testnet(tmp_path_factory.mktemp("net"))
        started.append(net)
        net.run("up", "--nodes", nodes, *options)
        return net

    yield make
    for net in started:
        pids = [node.pid for node in net.nodes.values() if node.pid]
        net.run("down")
        assert not [pid for pid in pids if alive(pid)], "testnet down left processes"


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    """Four nodes for the tests of one module: alice is main, bob, carol and dave are gpu."""
    net = Testnet(tmp_path_factory.mktemp("swarm"))
    net.run("up", "--nodes", 4)
    yield net
    net.run("down")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever starts daemons is slow: `make quick` leaves this folder out."""
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Shows the daemons' logs with a failing test."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed and report.when == "call":
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, Testnet):
                report.sections.append(("daemons", value.logs()))
