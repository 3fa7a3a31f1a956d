"""`metrics.*`: the node's numbers, as Prometheus would see them."""

from protocols.rpc.fields import Request, Result


class MetricsRequest(Request, frozen=True):
    """No parameters."""


class Sample(Result, frozen=True):
    """One value. A histogram's samples end in `_bucket` (with the label `le`), `_count`, `_sum`."""

    name: str
    labels: dict[str, str]
    value: float


class MetricsResult(Result, frozen=True):
    """Every sample; `url` is where Prometheus can read them, None where no port was opened."""

    url: str | None
    samples: list[Sample]
