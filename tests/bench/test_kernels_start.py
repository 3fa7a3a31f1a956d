"""Starts are measured in processes of their own, and leave kept code behind."""

from pathlib import Path

import pytest

from blyan_node.bench import kernels_start
from blyan_node.moe.kernels.targets import runnable

pytestmark = pytest.mark.slow


def test_a_cold_start_keeps_what_the_next_ones_load(tmp_path: Path) -> None:
    (cold,) = kernels_start.start_together(tmp_path / "code", 1)
    assert [file.name.split("-")[0] for file in (tmp_path / "code").iterdir()] == [
        runnable()[0].name
    ]
    kept = kernels_start.start_together(tmp_path / "code", 2)
    assert len(kept) == 2 and all(start.load_cpu_s < cold.load_cpu_s for start in kept)
    assert all(0 < start.bytes < cold.bytes for start in kept)
