"""The numeric profile: what must agree for two nodes to compute the same bits."""

from dataclasses import dataclass

from protocols import limits
from protocols.precision import PUBLISHED, Precision, effective


def profile(arithmetic: str, precision: Precision = PUBLISHED, device: str = "cpu") -> str:
    """For example `cpu-sums3-published`: device, arithmetic (its `name`), precision of weights."""
    text = f"{device}-{arithmetic}-{effective(precision).removeprefix('as-')}"
    assert len(text) <= limits.profile_bytes_max
    return text


@dataclass(frozen=True)
class Profiles:
    """The profiles of a node: one arithmetic, in the precision that it holds or in another."""

    arithmetic: str
    precision: Precision
    device: str = "cpu"

    @property
    def own(self) -> str:
        """The node's: what it advertises and serves."""
        return self.of(self.precision)

    def of(self, precision: Precision) -> str:
        """That of a request in `precision`."""
        return profile(self.arithmetic, precision, self.device)
