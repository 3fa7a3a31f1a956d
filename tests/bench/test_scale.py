"""The scale run, small: its rows, its checks, and that nothing stays behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from blyan_node.bench import __main__ as command
from blyan_node.bench import memory, scale
from blyan_node.bench.rows import Row
from blyan_node.testing.daemons import alive
from protocols.errors import ErrorCode, Refused

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 6,
}  # fmt: skip
PROGRAM = """
from blyan_node.bench import scale
from blyan_node.__main__ import main
scale.CHANGES, scale.LAYERS, scale.DISK_BYTES = {changes!r}, 2, 1
raise SystemExit(main(["bench", "scale"]))
"""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "CHANGES", SMALL)
    monkeypatch.setattr(scale, "LAYERS", 2)
    monkeypatch.setattr(scale, "DISK_BYTES", 1)


def test_it_runs_only_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in command.MEASUREMENTS:
        monkeypatch.setitem(command.MEASUREMENTS, name, f"fake_{name}")

    class Fake:
        def __init__(self, module: str) -> None:
            self.module = module

        def measure(self) -> list[Row]:
            ran.append(self.module.removeprefix("blyan_node.bench.fake_"))
            return []

    monkeypatch.setattr(command.importlib, "import_module", Fake)
    assert command.main([]) == 0
    assert set(ran) == set(command.MEASUREMENTS) - command.WHEN_NAMED
    assert "scale" in command.WHEN_NAMED
    assert command.main(["scale"]) == 0
    assert ran[-1] == "scale"


def test_a_disk_that_is_too_small_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "DISK_BYTES", 1 << 60)
    with pytest.raises(Refused, match="was not measured") as refused:
        next(scale.measure())
    assert refused.value.code == ErrorCode.DISK_FULL


@pytest.mark.slow
def test_a_small_model_goes_all_the_way(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    rows = {made.name: made for made in scale.measure()}
    names = ["publish", "1 of each expert", "2 of each expert", "first token", "prefill", "decode"]
    assert [name.removeprefix("scale ") for name in rows][:6] == names
    nodes = [made for name, made in rows.items() if name.startswith("scale memory")]
    assert len(nodes) == 4 and sum("trunk" in made.name for made in nodes) == 1
    held = [int(made.name.split(" experts")[0].split()[-1]) for made in nodes]
    assert held[0] == 0 and sum(held) == 2 * 2 * SMALL["num_local_experts"]
    for made in nodes:
        parts = ("of its packs", "of LevelDB's files", "of programs", "its own")
        assert sum(made.beside[part] or 0 for part in parts) == pytest.approx(made.value, rel=0.01)
        assert made.beside["copied by loading"] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(changes=SMALL)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with running:
        assert running.stdout is not None
        line = running.stdout.readline()  # of the first row: the daemons run
        assert line.startswith(b"scale publish"), running.communicate()
        (state,) = tmp_path.glob("*/net/testnet.json")
        pids = [member["pid"] for member in json.loads(state.read_text())["members"]]
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=120)
    assert running.returncode == 130 and b"Traceback" not in err
    assert len(pids) == 4 and not any(alive(pid) for pid in pids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say")
def test_no_work_takes_memory_that_grows_with_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert shutil.disk_usage(tmp_path).free > 5e9
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    small, large = memory.taken()
    assert large.size > 3.5 * small.size
    shares = {what: memory.share(small, large, what) for what in large.own}
    assert set(shares) == {"publish", "fetch", "serve", "hold", "export"}
    assert max(shares.values()) < memory.SHARE_MAX, shares
    for what, taken in large.files.items():
        held = large.held if what in ("fetch", "hold") else 0
        assert taken < held + memory.SHARE_MAX * large.size, what
