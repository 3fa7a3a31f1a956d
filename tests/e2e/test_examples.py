"""Every program in examples/ does what its first line says, on a real daemon."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Testnet
from protocols.ids import Subject

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES_MAX = 30
RUN_S_MAX = 60


def start(example: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts one example with its output captured."""
    words = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(process: subprocess.Popen[str]) -> str:
    """What an example printed; it must have ended well."""
    printed, _ = process.communicate(timeout=RUN_S_MAX)
    assert process.returncode == 0, printed
    return printed


def test_generate_watch_and_update(make_testnet: Callable[..., Testnet], tmp_path: Path) -> None:
    net = make_testnet(2)
    alice = net["alice"]
    events = start("watch_events.py", alice.rpc)
    model = make_checkpoint("mixtral", tmp_path / "tiny")
    alice("model", "publish", model, "--name", "tiny", "--wait-replicas", 1)
    assert events.stdout is not None
    assert any("release" in line for line in events.stdout)
    events.terminate()
    events.communicate(timeout=RUN_S_MAX)

    answer = output(start("generate.py", alice.rpc, "tiny", "3,17,42", 8))
    expected = alice(
        "generate", "--model", "tiny", "--prompt-ids", "3,17,42",
        "--max-tokens", 8, "--temperature", 0,
    )  # fmt: skip
    assert answer.split() == [*map(str, expected["token_ids"]), "root", expected["root"]]

    subject = Subject("layer0.expert0")
    shapes = Checkpoint.open(model).describe(subject)
    weights = {name: torch.zeros(shape) for name, (_, shape) in shapes.items()}
    save_file(weights, tmp_path / "new.safetensors")
    said = output(
        start("publish_update.py", alice.rpc, "tiny", subject, tmp_path / "new.safetensors")
    )
    after = alice("model", "show", "tiny")
    assert after["subjects"][subject]["block"] in said
    assert after["root"] in said
    assert after["root"] != expected["root"]


def test_an_example_is_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert lengths.keys() == {"generate.py", "watch_events.py", "publish_update.py"}
    assert max(lengths.values()) <= LINES_MAX
