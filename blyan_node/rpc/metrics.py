"""`metrics.*`."""

from blyan_node.metrics.exposition import Readings
from blyan_node.parts import App
from blyan_node.rpc.context import Context
from protocols.rpc import metrics


async def read(
    app: App, request: metrics.MetricsRequest, context: Context
) -> metrics.MetricsResult:
    """Every sample, read now."""
    samples = [
        metrics.Sample(name=sample.name, labels=dict(sample.labels), value=float(sample.value))
        for family in Readings(app).collect()
        for sample in family.samples
    ]
    return metrics.MetricsResult(url=app.metrics.url, samples=samples)
