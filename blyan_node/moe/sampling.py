"""Choosing the next token: from the logits, the settings, the seed and how many came before.

Nothing global is read: two nodes that see the same logits choose the same token, and a session that
goes on elsewhere continues with `drawn` tokens already chosen.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from protocols.errors import ErrorCode, Refused

TEMPERATURE_MIN, TEMPERATURE_MAX = 1e-9, 100.0  # below the first it is greedy anyway


@dataclass
class Sampler:
    """Greedy at temperature 0, else nucleus sampling; `drawn` counts the tokens chosen so far."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    drawn: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= TEMPERATURE_MAX:
            _refuse(f"temperature {self.temperature}", f"expected 0 to {TEMPERATURE_MAX:g}")
        if not 0 < self.top_p <= 1:
            _refuse(f"top-p {self.top_p}", "expected more than 0, at most 1")
        if not 0 <= self.seed < 1 << 64:
            _refuse(f"seed {self.seed}", "expected a whole number from 0 to 2^64 - 1")

    def pick(self, logits: Tensor) -> int:
        """The next token after logits [vocab]; of equal ones the smaller id."""
        number, self.drawn = self.drawn, self.drawn + 1
        values = logits.numpy().astype(np.float64)
        if not np.isfinite(values).all():
            raise Refused(
                ErrorCode.BAD_MODEL, "no next token", "the model's logits are not all finite"
            )
        if self.temperature == 0:
            return int(values.argmax())
        order = np.argsort(-values, kind="stable")
        scaled = (values[order] - values[order[0]]) / max(self.temperature, TEMPERATURE_MIN)
        reached = np.cumsum(np.exp(scaled))
        kept = int(np.searchsorted(reached, self.top_p * reached[-1])) + 1
        kept = min(kept, len(order))
        place = np.searchsorted(reached[:kept], self._uniform(number) * reached[kept - 1], "right")
        return int(order[min(int(place), kept - 1)])

    def _uniform(self, number: int) -> float:
        """A number in [0, 1) from the seed and the token's number, 53 bits."""
        digest = hashlib.sha256(
            b"blyan/sample/1" + self.seed.to_bytes(8, "big") + number.to_bytes(8, "big")
        ).digest()
        return (int.from_bytes(digest[:7], "big") >> 3) / 2**53


def _refuse(what: str, why: str) -> None:
    raise Refused(ErrorCode.BAD_INPUT, what, why)
