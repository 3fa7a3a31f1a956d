"""Conversion to the holder's precision: its definition, in plain Python, bit for bit."""

import math
import random
import struct
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from blyan_node.moe import precision, stored
from blyan_node.moe.precision import LEAST_SCALE, convert
from blyan_node.moe.stored import Scaled, widened
from protocols.errors import Refused
from protocols.precision import Precision

MOST = {"int8": 127.0, "fp8": 448.0}


def f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def nearest(value: Fraction, choices: list[tuple[Fraction, int]]) -> int:
    """The code of the nearest number; of two as near, the one whose code is even."""
    return min(choices, key=lambda one: (abs(one[0] - value), one[1] % 2))[1]


def _fp8_numbers() -> list[tuple[Fraction, int]]:
    """The non-negative numbers of e4m3fn with their codes."""
    found = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        unit = Fraction(2) ** (max(exponent, 1) - 10)
        found.append(((mantissa + (8 if exponent else 0)) * unit, code))
    return found


FP8_NUMBERS = _fp8_numbers()
INT8_NUMBERS = [(Fraction(code), code) for code in range(128)]


def plain(row: list[float], kind: str) -> tuple[list[int], float]:
    """The codes of a row as bytes, and its scale, as docs/precision.md says."""
    scale = max(f32(max(map(abs, row)) / MOST[kind]), LEAST_SCALE)
    codes = []
    for value in row:
        share = Fraction(min(abs(f32(value / scale)), MOST[kind]))
        code = nearest(share, FP8_NUMBERS if kind == "fp8" else INT8_NUMBERS)
        negative = math.copysign(1, value) < 0
        if kind == "fp8":
            codes.append(code | 0x80 * negative)
        else:
            codes.append(-code % 256 if negative else code)
    return codes, scale


def _rows(seed: int) -> list[list[float]]:
    """Rows of every size, with ties, denormals, zeros of both signs and a row of zeros."""
    pick = random.Random(seed)
    rows = [
        [0.0] * 23,
        [-0.0] * 23,
        [1e-45] + [0.0] * 22,
        [127.0, 0.5, 1.5, 2.5, -3.5] + [-0.5] * 18,
    ]
    rows.append(
        [448.0, 17.0, 19.0, 232.0, 0.0009765625, 0.0029296875, 2.0**-10, -464.0] + [30.0] * 15
    )
    for exponent in (-149, -140, -126, -120, -30, 0, 30, 100):
        rows.append([f32(pick.uniform(-1, 1) * 2.0**exponent) for _ in range(23)])
    return rows


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("tile_floats", [1 << 20, 40])
def test_codes_and_scales_are_those_of_the_definition(
    kind: Precision, tile_floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "TILE_FLOATS", tile_floats)
    for seed in range(8):
        rows = _rows(seed)
        made = convert(torch.tensor(rows), kind, "w")
        assert isinstance(made, Scaled)
        for row, codes, scale in zip(rows, made.codes.view(torch.uint8), made.scales, strict=True):
            assert (codes.tolist(), float(scale)) == plain(row, kind)


def test_a_matrix_stored_by_columns_gives_the_same_and_is_kept_by_rows() -> None:
    weight = torch.randn(33, 50, generator=torch.Generator().manual_seed(3))
    by_columns = weight.t().contiguous().t()
    for kind in ("bfloat16", "float16", "fp8", "int8"):
        once, again = convert(weight, kind, "w"), convert(by_columns, kind, "w")
        assert torch.equal(widened(once), widened(again))
        codes = again.codes if isinstance(again, Scaled) else again
        assert codes.is_contiguous()


def test_halves_are_rounded_to_nearest_even() -> None:
    values = [struct.unpack("<f", struct.pack("<I", bits))[0] for bits in _patterns(0x477FE000)]
    made = convert(torch.tensor([values]), "float16", "w")
    assert isinstance(made, Tensor)
    expected = [struct.pack("<e", value) for value in values]
    assert made.view(torch.uint8).numpy().tobytes() == b"".join(expected)


def test_bfloat16_is_rounded_to_nearest_even_and_keeps_denormals() -> None:
    bits = _patterns(0x7F7F0000)
    values = [struct.unpack("<f", struct.pack("<I", one))[0] for one in bits]
    made = convert(torch.tensor([values]), "bfloat16", "w")
    assert isinstance(made, Tensor)
    for one, rounded in zip(bits, made.view(torch.int16)[0].tolist(), strict=True):
        low, kept = one & 0xFFFF, one >> 16
        up = low > 0x8000 or (low == 0x8000 and kept & 1)
        assert rounded % 65536 == kept + up


def _patterns(most: int) -> list[int]:
    """Bits of float32 up to `most`, of both signs: ties, their neighbours, denormals."""
    pick = random.Random(5)
    bits = [0, 1, 0x8000, 0x18000, 0x7FFF, 0x8001, 0x007FFFFF, 0x00800000, 0x3F808000, 0x3F818000]
    bits += [0x38800000 - 0x1000, 0x33800000, 0x33000000, 0x33000001, 0x3F801000, 0x3F803000]
    bits += [pick.randrange(most) & ~0xFFF | pick.choice((0, 0xFFF, 0x800)) for _ in range(4000)]
    return [one | sign for one in bits if one < most for sign in (0, 1 << 31)]


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "fp8", "int8"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_finite_number_is_refused_by_name(kind: Precision, value: float) -> None:
    weight = torch.zeros(70, 30)
    weight[69, 29] = value
    with pytest.raises(Refused, match=r"layer0\.expert1: w1 has infinities or NaN"):
        convert(weight, kind, "layer0.expert1: w1")


@pytest.mark.parametrize(("kind", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_what_is_too_large_is_refused_by_name(kind: Precision, value: float) -> None:
    with pytest.raises(Refused, match=f"w1 has a value that is too large for {kind}"):
        convert(torch.tensor([[1.0, -value]]), kind, "w1")


def test_tiles_of_a_scaled_matrix_are_of_its_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored, "TILE_FLOATS", 64)
    weight = torch.randn(150, 7, generator=torch.Generator().manual_seed(1))
    for kind in ("int8", "fp8"):
        made = convert(weight, kind, "w")
        assert isinstance(made, Scaled)
        whole = widened(made)
        assert torch.equal(whole, made.codes.float() * made.scales[:, None])
        tiles = {first: tile.clone() for first, tile in stored.tiles(made, 1)}
        assert len(tiles) > 1 and torch.equal(torch.cat(list(tiles.values())), made.codes.float())
        for numbers in ([149, 0, 149, 7], [149], [0]):
            assert torch.equal(stored.rows_of(made, numbers), whole[numbers])
        assert (whole - weight).abs().max() < 0.1
