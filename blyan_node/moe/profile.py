"""The numeric profile: what must agree for two nodes to compute the same bits."""

from protocols import limits


def profile(arithmetic: str, precision: str = "published") -> str:
    """For example `cpu-sums1-published`: device, arithmetic (its `name`), precision of weights."""
    text = f"cpu-{arithmetic}-{precision}"
    assert len(text) <= limits.profile_bytes_max
    return text
