"""Rotary embedding: the angle of each position, the same bits on every machine.

Libraries do not agree about the last bit of a power, a cosine or a sine, so these are made of
operations that are rounded in one way only: decimal arithmetic of fixed precision for what is
needed once, and sums and products of float64 for the tables (docs/sums.md).
"""

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from blyan_node.moe.config import Rope

_TABLE_POSITIONS = 512
_DIGITS = 40

# π/2 in three pieces; the first two have 33 bits, so that up to 2^20 times a piece is exact.
_HALF_PI = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SIN = [(-1) ** (k // 2) / math.factorial(k) for k in range(3, 18, 2)]  # of r^3, r^5, …
_COS = [(-1) ** (k // 2) / math.factorial(k) for k in range(2, 17, 2)]  # of r^2, r^4, …

Floats = npt.NDArray[np.float64]


def natural_log(value: float) -> float:
    """ln(value) for value > 0, the float64 nearest to it."""
    with localcontext() as context:
        context.prec = _DIGITS
        return float(Decimal(value).ln())


def _power(base: float, exponent: float) -> float:
    with localcontext() as context:
        context.prec = _DIGITS
        return float((Decimal(base).ln() * Decimal(exponent)).exp())


def cos_sin(angles: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of angles from 0 to a million, within 2^-50."""
    turns = np.rint(angles * (2 / math.pi))
    r = angles
    for piece in _HALF_PI:
        r = r - turns * piece
    square = r * r
    sin, cos = _series(_SIN, square) * square * r + r, _series(_COS, square) * square + 1.0
    quarter = turns.astype(np.int64) % 4
    return (
        np.choose(quarter, [cos, -sin, -cos, sin]),
        np.choose(quarter, [sin, cos, -sin, -cos]),
    )


def _series(coefficients: list[float], square: Floats) -> Any:
    total: Any = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * square + coefficient
    return total


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of a head's dimensions: float32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / torch.tensor([_power(rope.theta, one) for one in exponents.tolist()])
    if rope.factor is None:
        return plain
    low, high = (
        head_dim * natural_log(rope.original_positions / (turns * 2 * math.pi))
        / (2 * natural_log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )  # fmt: skip
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high if high != low else high + 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


class RopeTable:
    """Cosine and sine by position, made in pieces of a fixed size when they are first needed."""

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._factor = rope.attention_factor
        self.score_factor = rope.score_factor
        self._pieces: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the positions [first, last), times YaRN's attention factor.

        Each float32 [last - first, head_dim / 2].
        """
        number, place = divmod(first, _TABLE_POSITIONS)
        end = place + last - first
        cos, sin = self._piece(number)
        if end <= _TABLE_POSITIONS:
            return cos[place:end], sin[place:end]
        middle = (number + 1) * _TABLE_POSITIONS
        more = self.rows(middle, last)
        return torch.cat((cos[place:], more[0])), torch.cat((sin[place:], more[1]))

    def _piece(self, number: int) -> tuple[Tensor, Tensor]:
        if number not in self._pieces:
            positions = torch.arange(_TABLE_POSITIONS, dtype=torch.float32)
            angles = (positions + number * _TABLE_POSITIONS)[:, None] * self._frequencies
            cos, sin = (torch.from_numpy(one).float() for one in cos_sin(angles.double().numpy()))
            # The first to come stays: a token's steps are told where it lies (`token_pass`).
            self._pieces.setdefault(number, (cos * self._factor, sin * self._factor))
        return self._pieces[number]
