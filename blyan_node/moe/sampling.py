"""Choosing the next token: from the logits, the settings, the seed and how many came before.

Nothing global is read: two nodes that see the same logits choose the same token, and a session that
goes on elsewhere continues with `drawn` tokens already chosen. The steps and their order are those
of `transformers`: repetition penalty, temperature, top-k, top-p, min-p. They are computed in
float64 by operations that round in one way on every machine, so no library's exponential is used.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
from torch import Tensor

from protocols import limits
from protocols.errors import ErrorCode, Refused

Floats = npt.NDArray[np.float64]

TEMPERATURE_MIN = 1e-9  # below it, it is greedy anyway
# ln 2 in two parts: the first has few enough bits that its multiples here are exact.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_TERMS = 14
_BLOCK = 8192  # values whose exponentials are computed at once: they stay in the cache


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings; the defaults are greedy and change nothing. Raises `Refused` (BAD_INPUT)."""

    temperature: float = 0.0  # 0 takes the best logit
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value, allowed = getattr(self, one.name), ALLOWED[one.name]
            if not allowed.holds(value):
                _refuse(f"{one.name} {value}", f"expected {allowed.words}")


@dataclass(frozen=True, slots=True)
class Allowed:
    """The values that a setting may have, a whole number or any."""

    low: float
    high: float
    whole: bool = False
    above: bool = False  # `low` itself is not allowed

    @property
    def words(self) -> str:
        """As an error says it."""
        first = "more than " if self.above else "from "
        last = "at most" if self.above else "to"
        kind = "a whole number " if self.whole else "a number "
        return f"{kind}{first}{self.low:g} {last} {self.high:g}"

    def holds(self, value: object) -> bool:
        """Whether `value` is one of them."""
        kinds = (int,) if self.whole else (int, float)
        if type(value) not in kinds or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and not (self.above and value == self.low)


ALLOWED = {
    "temperature": Allowed(0, limits.temperature_max),
    "top_k": Allowed(0, limits.vocab_max, whole=True),
    "top_p": Allowed(0, 1, above=True),
    "min_p": Allowed(0, 1),
    "repetition_penalty": Allowed(0, limits.repetition_penalty_max, above=True),
}
GREEDY = Sampling()


@dataclass
class Sampler:
    """Chooses the tokens of one answer; `drawn` counts those chosen so far."""

    sampling: Sampling = GREEDY
    seed: int = 0
    drawn: int = 0
    _seen: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            _refuse(f"seed {self.seed}", "expected a whole number from 0 to 2^64 - 1")

    def see(self, ids: Iterable[int]) -> None:
        """Tells it of the prompt, whose tokens count as repeated if they come again."""
        if self.sampling.repetition_penalty != 1:
            self._seen.update(ids)

    def pick(self, logits: Tensor) -> int:
        """The next token after logits [vocab]; of equal ones the smaller id."""
        number, self.drawn = self.drawn, self.drawn + 1
        found = logits.numpy()
        if not np.isfinite(found).all():
            raise Refused(
                ErrorCode.BAD_MODEL, "no next token", "the model's logits are not all finite"
            )
        if self.sampling.temperature == 0 and self.sampling.repetition_penalty == 1:
            return int(found.argmax())  # as below
        values = found.astype(np.float64)
        self._penalise(values)
        if self.sampling.temperature == 0:
            token = int(values.argmax())
        else:
            ids, weights = kept(values, self.sampling)
            reached = np.cumsum(weights)
            place = np.searchsorted(reached, _uniform(self.seed, number) * reached[-1], "right")
            token = int(ids[min(int(place), len(ids) - 1)])
        self.see((token,))
        return token

    def _penalise(self, values: Floats) -> None:
        """Makes tokens that were there before less likely (arXiv 1909.05858), in place."""
        seen = [token for token in self._seen if token < len(values)]
        if seen:
            penalty, old = self.sampling.repetition_penalty, values[seen]
            values[seen] = np.where(old < 0, old * penalty, old / penalty)


def kept(values: Floats, sampling: Sampling) -> tuple[npt.NDArray[np.int64], Floats]:
    """The tokens that may be drawn after `values` [vocab], and their weights.

    Weights are relative to the likeliest token's, which is 1. Of equal values at its edge, top-p
    keeps the smaller id first; top-k keeps them all, as `transformers` does.
    """
    ids = np.arange(len(values))
    if 0 < sampling.top_k < len(values):
        ids = ids[values >= np.partition(values, -sampling.top_k)[-sampling.top_k]]
    scaled = (values[ids] - values.max()) / max(sampling.temperature, TEMPERATURE_MIN)
    weights = np.concatenate([_exp(scaled[i : i + _BLOCK]) for i in range(0, len(ids), _BLOCK)])
    if sampling.top_p < 1:
        total = np.cumsum(weights)[-1]
        # What is so light is left out even if all are: the rest is sorted in no time.
        heavy = weights * (2 * len(weights)) > (1 - sampling.top_p) * total
        ids, weights = ids[heavy], weights[heavy]
        order = np.argsort(-weights, kind="stable")
        reached = np.cumsum(weights[order])
        order = order[: int(np.searchsorted(reached, sampling.top_p * total)) + 1]
        ids, weights = ids[order], weights[order]
    heavy = weights >= sampling.min_p
    return ids[heavy], weights[heavy]


def _exp(x: Floats) -> Floats:
    """e^x for x ≤ 0 within a few units of the last place, with the same bits everywhere."""
    x = np.maximum(x, -745.0)
    twos = np.rint(x / (_LN2_HIGH + _LN2_LOW))
    rest = (x - twos * _LN2_HIGH) - twos * _LN2_LOW  # at most ln 2 / 2 either way
    total = np.full_like(x, 1 / math.factorial(_TERMS))
    for power in range(_TERMS - 1, -1, -1):  # Taylor's series by Horner's rule
        total *= rest
        total += 1 / math.factorial(power)
    return np.ldexp(total, twos.astype(np.int64))


def _uniform(seed: int, number: int) -> float:
    """A number in [0, 1) from the seed and the token's number, 53 bits."""
    digest = hashlib.sha256(
        b"blyan/sample/1" + seed.to_bytes(8, "big") + number.to_bytes(8, "big")
    ).digest()
    return (int.from_bytes(digest[:7], "big") >> 3) / 2**53


def _refuse(what: str, why: str) -> None:
    raise Refused(ErrorCode.BAD_INPUT, what, why)
