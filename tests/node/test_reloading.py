"""A new configuration for a node that runs, where taking it up goes wrong half-way."""

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blyan_node.config import Config, make_config
from blyan_node.config_file import read_file
from blyan_node.in_use import InUse
from blyan_node.parts import App
from blyan_node.reloading import Reloading
from blyan_node.services.held import Reason
from blyan_node.services.placement import Placement, PlacementConfig
from blyan_node.settings import Settings
from blyan_node.testing.trio_tests import trio_test
from protocols.dag.genesis import DEVELOPMENT
from protocols.signing import Identity

ALICE, BOB = (
    f"/ip4/192.0.2.{n}/tcp/4040/p2p/{Identity.from_seed(bytes([n]) * 32).peer_id}" for n in (1, 2)
)


def _config(text: str) -> Config:
    file = read_file('memory = "1GiB"\n' + text)
    return make_config(Path("/home/alice"), DEVELOPMENT, None, file, Settings())


class Parts:
    """The parts of a node that a reload touches; they note what they were told."""

    def __init__(self, text: str) -> None:
        self.told: list[tuple[str, Any]] = []
        self.broken: set[str] = set()
        self.in_use = InUse(_config(text))
        self.identity = None
        self.store = SimpleNamespace(set_quota=self._note("disk"))
        self.network = SimpleNamespace(
            add_bootstrap=self._note("bootstrap"), set_allowed=self._note("allowed_peers")
        )
        self.adverts = SimpleNamespace(set_auto=self._note("auto"))
        self.placement = SimpleNamespace(configure=self._configure)

    def _note(self, name: str) -> Any:
        def note(value: Any) -> None:
            if name in self.broken:
                raise KeyError(name)
            self.told.append((name, value))

        return note

    async def _configure(self, value: Any) -> None:
        self._note("placement")(value)

    def reloading(self, text: str) -> Reloading:
        return Reloading(cast(App, self), lambda: _config(text))

    def setting(self, key: str) -> Any:
        return next(setting for setting in self.in_use.told().settings if setting.key == key)


@trio_test
async def test_what_fails_half_way_ends_nothing_and_is_told_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = Parts('disk = "1GiB"\nreplicas = 2\n')
    node.broken = {"placement"}
    with caplog.at_level(logging.INFO, "blyan_node"):
        done = await node.reloading('disk = "2GiB"\nreplicas = 3\n').reload()
    assert (done.live, done.waiting) == (("disk",), ("replicas",))
    assert ("disk", 2 * 2**30) in node.told
    assert (node.setting("disk").value, node.setting("disk").waiting) == ("2GiB", False)
    assert (node.setting("replicas").value, node.setting("replicas").waiting) == (2, True)
    assert "replicas could not be changed: a bug of ours" in caplog.text
    node.broken = set()  # the same file once more takes up what was left
    done = await node.reloading('disk = "2GiB"\nreplicas = 3\n').reload()
    assert (done.live, done.waiting) == (("replicas",), ())
    assert (node.setting("replicas").value, node.setting("replicas").waiting) == (3, False)


@trio_test
async def test_a_bootstrap_node_that_was_taken_out_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = Parts(f'bootstrap = ["{ALICE}", "{BOB}"]')
    with caplog.at_level(logging.INFO, "blyan_node"):
        await node.reloading(f'bootstrap = ["{BOB}"]').reload()
    assert f"forgotten at the next start only: {ALICE}" in caplog.text
    assert BOB not in caplog.text


@trio_test
async def test_a_file_that_is_wrong_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    node = Parts("replicas = 2")
    before = node.in_use.config
    with caplog.at_level(logging.INFO, "blyan_node"):
        done = await node.reloading('replicas = "many"').reload()
    assert (done.live, done.waiting, node.told) == ((), (), [])
    assert node.in_use.config is before
    assert "line 2, column 12: replicas" in caplog.text


@trio_test
async def test_an_expert_that_goes_by_itself_meanwhile_is_no_reason_to_stop() -> None:
    """As one does whose room a request needs, while another is let go."""
    held = {block: layer for layer, block in enumerate([b"one", b"two", b"three"])}

    async def drop(block: bytes) -> None:
        del held[block]
        held.pop(b"two", None)

    def listed() -> list[SimpleNamespace]:
        return [
            SimpleNamespace(
                reason=Reason.PLACEMENT, what=SimpleNamespace(block=block, layer=layer, expert=0)
            )
            for block, layer in held.items()
        ]

    nothing: Any = None
    holding: Any = SimpleNamespace(held=listed, drop=drop)
    peer = Identity.from_seed(bytes(32)).peer_id
    config = PlacementConfig("auto", 2)
    placement = Placement(config, nothing, nothing, nothing, nothing, holding, peer)
    await placement.configure(replace(config, mode="none"))
    assert held == {}
