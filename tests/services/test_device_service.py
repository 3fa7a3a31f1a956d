"""Nodes that compute on a device, among others: who computes for whom, and what takes memory."""

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch

from blyan_node.app import room_for_weights
from blyan_node.config import make_config
from blyan_node.config_file import read_file
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.devices import OnDevice
from blyan_node.moe.reference import Reference
from blyan_node.services.compute import apply_expert
from blyan_node.settings import Settings
from blyan_node.testing.arithmetic import best
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.swarm import PROFILE, Swarm
from blyan_node.testing.trio_tests import trio_test
from protocols.dag.genesis import DEVELOPMENT
from protocols.errors import ErrorCode, Refused
from protocols.rpc.generate import GenerateRequest, Token

PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26]
ALL = [f"layer{layer}.expert{expert}" for layer in range(3) for expert in range(6)]


def _nobody(token: Token) -> None:
    """Takes tokens and does nothing with them."""


@trio_test
async def test_only_nodes_with_the_device_compute_for_each_other(tmp_path: Path) -> None:
    """One has a device and holds half, one has it and holds the rest, one has none and holds all.

    The device is the CPU by torch: its tokens are the reference's, and so is what it takes.
    """
    path, device = make_checkpoint("mixtral", tmp_path / "m"), OnDevice(torch.device("cpu"))
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main", device=device)
    bob, carol, dave = (
        swarm.node(name, device=of) for name, of in
        (("bob", device), ("carol", device), ("dave", None))
    )  # fmt: skip
    async with swarm.started():
        published = await alice.publish(path, "tiny")
        for node, subjects in ((bob, ALL[::2]), (carol, ALL[1::2]), (dave, ALL)):
            await node.hold(published.model, subjects)
        await alice.sees(36)
        request = GenerateRequest(model="tiny", prompt_ids=PROMPT, max_tokens=8, ignore_eos=True)
        result = await alice.generation.generate(request, _nobody)
        checkpoint = Checkpoint.open(path)
        truth = Reference(checkpoint.config, checkpoint.load, device)
        assert result.token_ids == truth.generate(PROMPT, 8)
        asked = {peer for entry in result.trace.values() for peer in entry.peers}
        assert asked == {bob.peer_id, carol.peer_id}
        assert result.profile == bob.adverts.config.profile != PROFILE
        for node, copied in ((bob, True), (dave, False)):
            memory, experts = node.holding.memory, [one.expert for one in node.holding.held()]
            assert memory.experts == sum(one.bytes for one in experts) > 0
            assert memory.copied == (memory.experts if copied else 0)
            assert bool(node.store.packs.bytes) != copied, "what is on the device is there alone"


class _Full:
    """A device that has no memory left for the first `times` that something is computed."""

    def __init__(self, times: int, compute: Callable[..., Any]) -> None:
        self._left, self._compute = times, compute

    def __call__(self, *given: Any) -> Any:
        self._left -= 1
        if self._left >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return self._compute(*given)


@trio_test
async def test_a_worker_whose_device_is_full_leaves_a_request_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And serves those that come later: another program has taken the memory for a moment."""
    path, device = make_checkpoint("mixtral", tmp_path / "m"), OnDevice(torch.device("cpu"))
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main", device=device)
    workers = [swarm.node(name, device=device) for name in ("bob", "carol")]
    async with swarm.started():
        published = await alice.publish(path, "tiny")
        for node in workers:
            await node.hold(published.model, ALL)
        await alice.sees(36)
        monkeypatch.setattr("blyan_node.services.serving.apply_expert", _Full(1, apply_expert))
        request = GenerateRequest(model="tiny", prompt_ids=PROMPT, max_tokens=4, ignore_eos=True)
        result = await alice.generation.generate(request, _nobody)
        checkpoint = Checkpoint.open(path)
        truth = Reference(checkpoint.config, checkpoint.load, device)
        assert result.token_ids == truth.generate(PROMPT, 4)
        asked = {peer for entry in result.trace.values() for peer in entry.peers}
        assert asked <= {node.peer_id for node in workers} and result.stats.retries == 1
    assert caplog.text.count("no memory left for this: CUDA out of memory.") == 1


@pytest.mark.parametrize(
    "where", ["session.Trunk.enter", "layers.apply_expert", "generation.Decoding._run"]
)
@trio_test
async def test_a_request_on_a_full_device_is_refused_and_the_next_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path, device = make_checkpoint("mixtral", tmp_path / "m"), OnDevice(torch.device("cpu"))
    swarm = Swarm(tmp_path)
    alice = swarm.node("alice", "main", device=device)
    async with swarm.started():
        await alice.publish(path, "tiny")
        await alice.hold(alice.chain.find_model("tiny").id, ALL)
        request = GenerateRequest(model="tiny", prompt_ids=PROMPT, max_tokens=4, ignore_eos=True)
        place = f"blyan_node.services.{where}"
        full = _Full(1, resolve_name(place))
        monkeypatch.setattr(place, lambda *given: full(*given))
        with pytest.raises(Refused, match="no memory left") as refused:
            await alice.generation.generate(request, _nobody)
        assert refused.value.code is ErrorCode.BUSY
        assert refused.value.why == "CUDA out of memory. Tried to allocate 2 GiB."
        assert len((await alice.generation.generate(request, _nobody)).token_ids) == 4


@trio_test
async def test_what_a_full_device_does_not_load_is_refused_and_nothing_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrices were the last that fitted, and a bias or a norm is what does not."""
    path, device = make_checkpoint("mixtral", tmp_path / "m"), OnDevice(torch.device("cpu"))
    alice = (swarm := Swarm(tmp_path)).node("alice", "main", device=device)
    async with swarm.started():
        model = (await alice.publish(path, "tiny")).model
        for name in ("holding.Expert", "trunks.Trunk"):
            full = _Full(1, resolve_name(f"blyan_node.services.{name}"))
            monkeypatch.setattr(
                f"blyan_node.services.{name}", lambda *given, full=full, **named: full(*given)
            )
        with pytest.raises(Refused, match="no memory left"):
            await alice.hold(model, ALL)
        request = GenerateRequest(model="tiny", prompt_ids=PROMPT, max_tokens=4, ignore_eos=True)
        with pytest.raises(Refused, match="no memory left"):
            await alice.generation.generate(request, _nobody)
        assert alice.holding.memory.experts == alice.holding.memory.trunks == 0
        await alice.hold(model, ALL)
        assert len((await alice.generation.generate(request, _nobody)).token_ids) == 4


def test_weights_take_no_more_than_the_device_has(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What computes with them needs some of it too; the CPU's memory is the operator's to give."""
    free = 10 << 30
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free, 16 << 30))
    device = OnDevice(torch.device("cuda:0"))
    for given, taken in (("1GiB", 1 << 30), ("64GiB", free - (512 << 20))):
        told = make_config(
            Path("/home/alice"), DEVELOPMENT, None, read_file(f'memory = "{given}"'), Settings()
        )
        assert room_for_weights(told, device) == taken
        assert room_for_weights(told, best()) == told.memory_bytes
    assert caplog.text.count("has room for 9728 MiB of the 65536 MiB") == 1
