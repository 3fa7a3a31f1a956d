"""Weights in place: a tile has the bits of the whole, and MXFP4 the values of its definition."""

import random

import pytest
import torch
from torch import Tensor

from blyan_node.moe import stored
from blyan_node.moe.numerics import linear
from blyan_node.moe.stored import Mxfp4
from protocols.errors import Refused

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
SHAPES = [(1, 3), (6, 40), (97, 37), (129, 257), (300, 48), (1536, 576), (576, 1536), (65, 4097)]


@pytest.fixture(params=[1 << 20, 1 << 12])
def tile_floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tiles that products use, and small ones, of which even small matrices have several."""
    monkeypatch.setattr(stored, "TILE_FLOATS", request.param)
    return int(request.param)


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _whole(x: Tensor, weight: Tensor) -> Tensor:
    """The plain product with the whole float32 matrix, row by row."""
    rows = [torch.mv(weight, row.clone()) for row in x]
    return torch.stack(rows)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "into"), SHAPES)
def test_tiles_have_the_bits_of_the_whole(
    tile_floats: int, out: int, into: int, dtype: torch.dtype, by_columns: bool, threads: int
) -> None:
    weight, x = _noise(out, into, seed=1).to(dtype), _noise(5, into, seed=2)
    weight = weight.t().contiguous().t() if by_columns else weight
    expected = _whole(x, weight.float())
    torch.set_num_threads(threads)
    assert torch.equal(linear(x, weight), expected)
    assert torch.equal(linear(x[:1], weight), expected[:1])


def test_tiles_of_any_shape_have_the_bits_of_the_whole() -> None:
    pick = random.Random(7)
    for seed in range(40):
        out, into = pick.randint(1, 2000), pick.randint(1, 1500)
        weight, x = _noise(into, out, seed=seed).bfloat16().t(), _noise(2, into, seed=seed)
        if seed % 2:
            weight = weight.contiguous()
        torch.set_num_threads(pick.choice((1, 2, 4)))
        assert torch.equal(linear(x, weight), _whole(x, weight.float()))


def test_a_bias_in_bfloat16_is_added_as_float32() -> None:
    weight, bias, x = _noise(40, 9, seed=1), _noise(40, seed=2).bfloat16(), _noise(3, 9, seed=3)
    assert torch.equal(linear(x, weight, bias), linear(x, weight) + bias.float())


def _every_byte(scale: int) -> Mxfp4:
    """A matrix [8, 64] whose blocks are every byte once."""
    blocks = torch.arange(256, dtype=torch.uint8).view(8, 2, 16)
    return Mxfp4(blocks, torch.full((8, 2), scale, dtype=torch.uint8))


def _widened(weight: Mxfp4) -> Tensor:
    out = torch.empty(weight.shape)
    weight.widen(0, weight.shape[0], out)
    return out


def test_mxfp4_values_are_those_of_the_definition() -> None:
    nibbles = torch.tensor([VALUES[n] for b in range(256) for n in (b & 15, b >> 4)]).double()
    for scale in range(stored.SCALE_MAX + 1):
        expected = nibbles * 2.0 ** (scale - 127)
        got = _widened(_every_byte(scale)).view(-1)
        assert torch.equal(got.double(), expected)
        assert torch.equal(got.signbit(), expected.signbit())


@pytest.mark.parametrize("scale", [241, 254, 255])
def test_a_scale_that_is_no_number_or_too_large_is_refused(scale: int) -> None:
    with pytest.raises(Refused, match=f"MXFP4 scale is {scale}"):
        _every_byte(scale)


def random_mxfp4(out: int, into: int, seed: int) -> Mxfp4:
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (out, into // 32, 16), generator=generator)
    scales = torch.randint(110, 125, (out, into // 32), generator=generator)
    return Mxfp4(blocks.to(torch.uint8), scales.to(torch.uint8))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("out", "into"), [(1, 32), (70, 64), (200, 2880), (513, 96)])
def test_mxfp4_products_have_the_bits_of_their_float32_matrix(
    tile_floats: int, out: int, into: int, threads: int
) -> None:
    weight, x = random_mxfp4(out, into, 1), _noise(4, into, seed=2)
    expected = _whole(x, _widened(weight))
    torch.set_num_threads(threads)
    assert torch.equal(linear(x, weight), expected)
    assert torch.equal(linear(x[2:3], weight), expected[2:3])


def test_one_buffer_serves_every_product_of_a_thread() -> None:
    matrices = [_noise(300, 400, seed=n).bfloat16() for n in range(3)]
    places = {tile.data_ptr() for weight in matrices for _, tile in stored.tiles(weight, 4)}
    assert len(places) == 1


def test_float32_is_not_copied() -> None:
    weight = _noise(500, 64, seed=1)
    for rows in (1, 4):
        for first, tile in stored.tiles(weight, rows):
            assert tile.data_ptr() == weight[first].data_ptr()
