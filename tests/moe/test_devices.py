"""torch on a device: the same code on the CPU, on a memory of its own, and on what GPU there is."""

import random
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blyan_node.moe.arithmetic import Arithmetic, choose
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.contract import Contract
from blyan_node.moe.devices import OnDevice, find, present
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.numerics import Plain
from blyan_node.moe.profile import Profiles
from blyan_node.moe.stored import Fp8Blocks, Mxfp4, Scaled, Weight
from blyan_node.moe.trunk import Trunk
from blyan_node.testing.arithmetic import best
from blyan_node.testing.elsewhere import FAR, Elsewhere
from blyan_node.testing.engine import Engine
from protocols import limits
from protocols.errors import Refused
from protocols.precision import PRECISIONS, Precision

TOLERANCE = 1e-4
GPUS = [name for name in present() if name != "cpu"]
NO_GPU = pytest.mark.skip(f"torch {torch.__version__} finds no GPU on this machine")
GPU = [pytest.param(name) for name in GPUS] or [pytest.param("cuda:0", marks=NO_GPU)]
REAL = ["cpu", *GPU]
PLACES = [*REAL, "elsewhere"]
SLOWLY = ["gpt_oss-odd", "olmoe-odd", "deepseek_v3-odd"]


def _rules(place: str) -> OnDevice:
    return OnDevice(FAR if place == "elsewhere" else torch.device(place))


def _there(place: str) -> AbstractContextManager[object]:
    """A `with` block in which the device of a place can be computed on."""
    return Elsewhere() if place == "elsewhere" else nullcontext()


def _forward(
    path: Path, rules: Arithmetic, ids: list[int], cuts: list[int], precision: Precision
) -> Tensor:
    checkpoint = Checkpoint.open(path)
    engine, composed = (
        Engine(checkpoint.config, checkpoint.load, rules, precision),
        random.Random(1),
    )
    cache, other, at, got = engine.trunk.new_cache(8), engine.trunk.new_cache(), 0, []
    for count in cuts:
        requests = [(cache, ids[at : at + count]), (other, ids[:3])]
        got.append(engine.forward(requests, composed)[0])
        at += count
    return torch.cat(got)


@pytest.mark.slow
@pytest.mark.parametrize("place", REAL)
def test_rows_of_a_whole_model_depend_on_nothing_else(
    directory: Path, prompt: list[int], place: str
) -> None:
    """All at once, one by one and in pieces, in other company, in a cache that grows."""
    ids, rules = prompt[:22], _rules(place)
    whole, alone, pieces = (
        _forward(directory, rules, ids, cuts, "as-published")
        for cuts in ([22], [1] * 22, [5, 9, 1, 1, 6])
    )
    assert torch.equal(whole, alone) and torch.equal(whole, pieces)
    truth = _forward(directory, best(), ids, [22], "as-published")
    assert (whole - truth).abs().max() <= TOLERANCE * truth.abs().max()


@pytest.mark.parametrize("name", SLOWLY)
def test_a_memory_of_its_own_changes_no_bit(
    directories: dict[str, Path], prompt: list[int], name: str
) -> None:
    """Nothing is computed with that was not moved there, and all that is needed here comes back."""
    same = _forward(directories[name], _rules("cpu"), prompt[:3], [3], "as-published")
    with Elsewhere():
        found = _forward(directories[name], _rules("elsewhere"), prompt[:3], [2, 1], "as-published")
    assert torch.equal(found, same)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision(
    directories: dict[str, Path], prompt: list[int], precision: Precision, place: str
) -> None:
    if place == "mps" and precision == "fp8":
        pytest.skip("mps has no FP8")
    with _there(place):
        found = _forward(directories["mixtral"], _rules(place), prompt[:2], [2], precision)
    truth = _forward(directories["mixtral"], _others(precision), prompt[:2], [2], precision)
    assert (found - truth).abs().max() <= TOLERANCE * truth.abs().max()


def _others(storage: str) -> Arithmetic:
    """What else computes it by the same rule: the kernels have one of their own for int8."""
    return Plain() if storage == "int8" else best()


def _weights() -> dict[str, Weight]:
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(193, 96, generator=random)
    codes = torch.randint(0, 256, (193, 3, 16), generator=random, dtype=torch.uint8)
    powers = torch.randint(100, 140, (193, 3), generator=random, dtype=torch.uint8)
    scales = torch.rand(193, generator=random)
    return {
        "float32": noise,
        "float32 by columns": noise.t().contiguous().t(),
        "bfloat16": noise.bfloat16(),
        "float16 by columns": noise.half().t().contiguous().t(),
        "mxfp4": Mxfp4(codes, powers),
        "int8": Scaled((100 * noise).clamp(-127, 127).to(torch.int8), scales),
        "fp8": Scaled(noise.to(torch.float8_e4m3fn), scales),
        "fp8 in blocks": Fp8Blocks(noise.to(torch.float8_e4m3fn), scales[:2, None]),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("storage", sorted(_weights()))
def test_products_of_every_storage_in_any_tiles(
    storage: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row has its bits among any others, and at any address."""
    if place == "mps" and storage.startswith("fp8"):
        pytest.skip("mps has no FP8")
    monkeypatch.setattr("blyan_node.moe.devices._TILE_FLOATS", 64 * 96)
    weight, bias = _weights()[storage], torch.arange(193.0)
    x = torch.randn(41, 96, generator=torch.Generator().manual_seed(2))
    truth = _others(storage).product(weight, bias)(x)
    with _there(place):
        product = _rules(place).product(weight, bias)
        alone = torch.cat([product(row.clone()[None]) for row in x])
        assert torch.equal(product(x), alone)
        for first, last in ((0, 2), (3, 40), (17, 18)):
            memory = torch.empty(96 * (last - first) + 1)[1:].view(last - first, 96)
            assert torch.equal(product(memory.copy_(x[first:last])), alone[first:last])
    assert alone.device.type == "cpu" and product.outs == 193
    assert torch.allclose(alone, truth, rtol=1e-4, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("storage", sorted(_weights()))
def test_a_product_moves_rows_and_nothing_else(storage: str) -> None:
    x = torch.ones(3, 96)
    with Elsewhere() as elsewhere:
        product = _rules("elsewhere").product(_weights()[storage])
        product(x)
        before = elsewhere.to, elsewhere.back
        out = product(x)
        assert (elsewhere.to, elsewhere.back) == (before[0] + 4 * 3 * 96, before[1] + 4 * 3 * 193)
    assert out.shape == (3, 193)


def _of_company(x: Tensor, *more: object) -> Tensor:
    """What a library might do whose order depends on how many rows there are, and on where."""
    return x + x.shape[0] + x.data_ptr() % 64


def test_what_has_a_sum_is_given_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU libraries happen to add these up alike; on a device none promises to."""
    for name in ("rms_norm", "softmax"):
        monkeypatch.setattr(Plain, name, lambda self, *given: _of_company(*given))
    rules, x = _rules("cpu"), torch.randn(5, 7, generator=torch.Generator().manual_seed(3))
    assert torch.equal(rules.rms_norm(x, x[0], 1e-5), x + 1)
    assert torch.equal(rules.softmax(x), x + 1)


def test_a_position_is_attended_to_in_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes with it, and however far the cache has grown: shapes, strides, alignment."""
    seen: list[object] = []
    product = torch.bmm

    def watched(*operands: Tensor) -> Tensor:
        seen.append([(one.shape, one.stride(), one.data_ptr() % 64) for one in operands])
        return product(*operands)

    monkeypatch.setattr("torch.bmm", watched)
    rules, asked = _rules("cpu"), []
    for room, rows, spare in ((16, 1, 0), (16, 3, 4), (64, 6, 4)):
        keys, values = torch.zeros(2, room, 16)[:, :11, :5], torch.zeros(2, room, 16)[:, :11, :7]
        query = torch.zeros(rows, 6, 5 + spare)[..., :5]
        rules.attend(query, keys, values, 0.5, window=9, sinks=torch.zeros(6))
        asked.append(seen[-2:])  # of the last row
    assert len(asked[0]) == 2 and asked[0] == asked[1] == asked[2]


def test_what_is_held_is_on_the_device_and_counted_once(directories: dict[str, Path]) -> None:
    """Matrices, norms and caches; of an embedding that is no head, only rows go there."""
    for name, tied in (("mixtral", False), ("mixtral-odd", True)):
        checkpoint = Checkpoint.open(directories[name])
        with Elsewhere() as elsewhere:
            trunk = Trunk(checkpoint.config, checkpoint.load, _rules("elsewhere"))
        plain = Trunk(checkpoint.config, checkpoint.load, best())
        lies = plain._embedding
        assert isinstance(lies, Tensor)
        embedding = 0 if tied else lies.numel() * lies.element_size()
        assert trunk.bytes == plain.bytes
        assert trunk.copied == trunk.bytes - embedding <= elsewhere.to
        assert ("embed" in trunk.converted) == tied
        assert len(trunk.converted) == len(set(trunk.converted)) and trunk.token is None
        with Elsewhere():
            cache = trunk.new_cache(8)
            attended = trunk.attend(0, trunk.embed([1, 2]), cache)
            assert {buffer.device for buffer in cache.seen(0, 0, 2)} == {attended.residual.device}
            assert attended.residual.device == FAR and attended.routed is not None
            routed, logits = attended.routed, trunk.logits(attended.residual)
            here = (routed.normed, routed.experts, routed.weights, logits)
            assert {one.device for one in here} == {torch.device("cpu")}, "others compute with it"


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (torch.OutOfMemoryError("Tried to allocate 20 GiB.\nmore"), "does not fit into the memory"),
        (TypeError("Float8_e4m3fn: no support for that dtype."), "cannot be held on meta"),
    ],
)
def test_what_a_device_cannot_hold_is_refused_by_name(
    error: Exception,
    what: str,
    directories: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(weight: Weight, device: torch.device) -> Weight:
        raise error

    monkeypatch.setattr("blyan_node.moe.precision.moved", full)
    checkpoint = Checkpoint.open(directories["mixtral"])
    with pytest.raises(Refused, match=what) as refused:
        Trunk(checkpoint.config, checkpoint.load, OnDevice(FAR))
    assert refused.value.why == str(error).split("\n")[0]


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices are taken at their word: there are none."""
    monkeypatch.setattr("blyan_node.moe.devices.trouble", lambda device: None)


@pytest.mark.usefixtures("untried")
def test_the_devices_that_an_operator_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blyan_node.moe.devices.present", lambda: ["cpu"])
    assert find("auto") is find("cpu") is None
    for name in ("cuda", "cuda:0", "cuda:7", "mps"):
        with pytest.raises(Refused, match=f"there is no device {name} on this machine") as refused:
            find(name)
        assert refused.value.why.endswith("finds cpu")
    monkeypatch.setattr("blyan_node.moe.devices.present", lambda: ["cpu", "cuda:0", "cuda:1"])
    assert find("cpu") is None
    assert find("auto") == find("cuda") == find("cuda:0") == torch.device("cuda:0")
    assert find("cuda:1") == torch.device("cuda:1")
    with pytest.raises(Refused, match="there is no device cuda:2") as refused:
        find("cuda:2")
    assert refused.value.why.endswith("finds cpu, cuda:0, cuda:1")


def test_kernels_that_are_chosen_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blyan_node.moe.devices.present", lambda: ["cpu", "mps", "cuda:0"])
    assert choose("torch", device="auto").device is None
    assert choose("torch", device="cpu").device is None
    with pytest.raises(Refused, match="the torch kernels compute on the cpu, not on cuda"):
        choose("torch", device="cuda")


def test_a_device_that_torch_finds_and_has_no_code_for_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An old GPU: torch says that it is available, and whatever is computed on it fails."""
    why = "CUDA error: no kernel image is available for execution on the device"

    def fails(*shape: int, device: torch.device) -> Tensor:
        raise RuntimeError(f"{why}\nCUDA kernel errors might be reported later.")

    monkeypatch.setattr("blyan_node.moe.devices.present", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr("torch.ones", fails)
    with pytest.raises(Refused, match="nothing can be computed on cuda:0") as refused:
        find("cuda")
    assert refused.value.why == why
    assert find("auto") is None and f"cuda:0 is not used: {why}\n" in caplog.text
    monkeypatch.setattr("torch.ones", lambda *shape, device: torch.zeros(*shape))
    assert find("auto") == find("cuda") == torch.device("cuda:0")


@pytest.mark.usefixtures("untried")
def test_auto_without_a_device_is_the_best_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blyan_node.moe.devices.present", lambda: ["cpu", "mps"])
    assert type(choose(device="auto", folder=user_folder())) is type(best())
    monkeypatch.setattr("blyan_node.moe.devices.present", lambda: ["cpu", "cuda:0"])
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.version.cuda", "12.8")
    rules = choose(device="auto")
    assert isinstance(rules, OnDevice) and rules.device == torch.device("cuda:0")
    assert rules.name.endswith("-cu12.8-h100-80gb-hbm3-rows")


@pytest.mark.parametrize("model", ["NVIDIA H100 80GB HBM3", "NVIDIA " + "W" * 99, "ß Ω", ""])
def test_a_device_is_in_the_profile(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: model)
    monkeypatch.setattr("torch.version.cuda", "12.8")
    name = OnDevice(torch.device("cuda:1")).name
    for precision in PRECISIONS:
        mine, theirs = Profiles(name, precision, "cuda"), Profiles(best().name, precision)
        assert mine.own.startswith("cuda-torch") and len(mine.own) <= limits.profile_bytes_max
        assert mine.own != theirs.own == f"cpu-{theirs.own.removeprefix('cpu-')}"
        assert mine.own.isascii() and mine.own == mine.own.lower()


def test_devices_that_compute_otherwise_have_profiles_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long names differ at their end: a whole GPU, and the pieces into which it can be cut."""
    pro = "NVIDIA RTX PRO 6000 Blackwell Server Edition"
    models = [pro, f"{pro} MIG 1g.24gb", f"{pro} MIG 2g.48gb"]
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: models[device.index])
    names = {OnDevice(torch.device("cuda", number)).name for number in range(3)}
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    for model in ("Apple M1", "Apple M4 Max"):
        monkeypatch.setattr("torch.backends.mps.get_name", lambda model=model: model)
        names.add(OnDevice(torch.device("mps")).name)
    assert len(names) == 5


def test_without_a_device_everything_stays_where_it_lies(directories: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(directories["mixtral"])
    trunk = Trunk(checkpoint.config, checkpoint.load, best())
    if isinstance(best(), Contract):
        assert trunk.copied == 0 and not trunk.converted
