"""The table of metrics, the page about them, the dashboard and what a node reads all agree."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from protocols import metrics
from protocols.metrics import LABELS, METRICS, Metric

HOUSE = Path(__file__).parents[2]
DASHBOARD = json.loads((HOUSE / "packaging/grafana/blyan.json").read_text())
OF_PROMETHEUS = {"instance", "job", "le"}


def _expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def _series_of(metric: Metric) -> set[str]:
    if metric.kind != "histogram":
        return {metric.name}
    return {metric.name + end for end in ("_bucket", "_count", "_sum")}


def _named(expression: str) -> set[str]:
    return set(re.findall(r"\bblyan_[a-z_]+", expression))


@pytest.mark.parametrize("row", METRICS.values(), ids=METRICS)
def test_a_metric_is_named_as_prometheus_wants_it(row: Metric) -> None:
    assert re.fullmatch(r"blyan_[a-z]+(_[a-z]+)*", row.name)
    assert row.name.endswith("_total") == (row.kind == "counter")
    assert bool(row.bounds) == (row.kind == "histogram")
    assert list(row.bounds) == sorted(set(row.bounds))
    assert set(row.labels) <= LABELS.keys()
    assert row.help and not row.help.endswith(".")


def test_the_page_is_current() -> None:
    assert (HOUSE / "docs/metrics.md").read_text() == metrics.page()


def test_every_series_of_the_dashboard_is_one_of_the_table() -> None:
    known = {series for row in METRICS.values() for series in _series_of(row)}
    for expression in _expressions():
        named = _named(expression)
        assert named, expression
        assert named <= known, expression


def test_every_metric_of_the_table_is_on_the_dashboard() -> None:
    shown = {name for expression in _expressions() for name in _named(expression)}
    assert [row.name for row in METRICS.values() if not _series_of(row) & shown] == []


def test_the_dashboard_asks_for_no_label_that_its_metric_lacks() -> None:
    of_series = {s: {*row.labels, *OF_PROMETHEUS} for row in METRICS.values()
                 for s in _series_of(row)}  # fmt: skip
    for expression in _expressions():
        labels: set[str] = set()
        for group in re.findall(r"by \(([a-z_, ]+)\)", expression):
            labels |= set(re.split(r", ?", group))
        labels |= set(re.findall(r'[{,]([a-z_]+)=~?"', expression))
        for series in _named(expression):
            assert labels <= of_series[series], expression


def test_a_counter_is_shown_as_a_rate_and_a_histogram_by_its_buckets() -> None:
    for expression in _expressions():
        for name in re.findall(r"\bblyan_[a-z_]+(?:_total|_bucket)\b", expression):
            assert re.search(rf"(rate|increase)\({name}\{{", expression), expression


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert max(Counter(panel["id"] for panel in panels).values()) == 1
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"])
                 for y in range(at["y"], at["y"] + at["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
