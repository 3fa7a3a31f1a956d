"""The readings in Prometheus's own forms. The one importer of prometheus_client."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from blyan_node.metrics.readings import Series, readings
from blyan_node.parts import App
from blyan_node.services.spread import Spread
from protocols import metrics as table

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(app: App) -> bytes:
    """Every metric of the table as Prometheus's text."""
    registry = CollectorRegistry()
    registry.register(Readings(app))
    return generate_latest(registry)


class Readings(Collector):
    """A collector that reads the services' counters each time that it is asked."""

    def __init__(self, app: App) -> None:
        self._app = app

    def describe(self) -> Iterator[Metric]:
        """Nothing: what is collected is read once a scrape."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """The families, in the table's order."""
        read = readings(self._app)
        for name, row in table.METRICS.items():
            yield _family(row, read[name.removeprefix("blyan_")])


def _family(row: table.Metric, series: Series) -> Metric:
    if row.kind == "histogram":
        spread = HistogramMetricFamily(row.name, row.help, labels=row.labels)
        for labels, value in series.items():
            assert isinstance(value, Spread)
            spread.add_metric(labels, value.buckets(), value.sum)
        return spread
    kind = GaugeMetricFamily if row.kind == "gauge" else CounterMetricFamily
    family = kind(row.name, row.help, labels=row.labels)
    for labels, value in series.items():
        assert not isinstance(value, Spread)
        family.add_metric(labels, value)
    return family
