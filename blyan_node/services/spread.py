"""How measured values are spread: counts between fixed bounds, as a histogram needs them."""

from bisect import bisect_left
from collections.abc import Sequence

from protocols.metrics import METRICS


class Spread:
    """Counts of values up to each of `bounds` (ascending), and beyond the last."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    @classmethod
    def of(cls, metric: str) -> "Spread":
        """With the bounds that the table has for `metric`."""
        return cls(METRICS[metric].bounds)

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), ending with `+Inf`: cumulative."""
        total, found = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found
