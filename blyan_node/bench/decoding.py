"""`decode-float32`: tokens/s of one daemon that holds everything, on one thread."""

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blyan_node.bench.models import write_model
from blyan_node.bench.nets import PROMPT, decode_rate, serving_net
from blyan_node.bench.rows import Row, alternate, row
from protocols.tensors.manifest import Dtype

RUNS = 5
TOKENS = 48
TRANSFORMERS = "transformers float32 (pip install 'blyan-node[test]')"


def measure() -> list[Row]:
    """Float32 weights, as published; the peer runs in a process of its own."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blyan-bench-")))
        model = write_model(scratch / "model", Dtype.F32)
        net = stack.enter_context(serving_net(scratch / "net", model, ["main"], hold="auto"))
        measures: dict[str, Callable[[], float]] = {"ours": lambda: decode_rate(net, TOKENS)}
        if importlib.util.find_spec("transformers"):
            measures["peer"] = stack.enter_context(transformers_peer(model))
        medians = alternate(RUNS, **measures)
    beside = {TRANSFORMERS: medians.get("peer")}
    goal = "ratio >= 2.4 (with contract kernels, a later step)"
    return [row("decode-float32", "tokens/s", medians["ours"], beside=beside, goal=goal, runs=RUNS)]


@contextmanager
def transformers_peer(model: Path) -> Iterator[Callable[[], float]]:
    """A call that decodes as many tokens with `transformers` on one thread, in tokens/s."""
    command = [sys.executable, "-m", "blyan_node.bench.transformers_peer", str(model), "1"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        into, out = process.stdin, process.stdout
        if out.readline().strip() != "ready":
            raise RuntimeError("transformers did not load the model")

        def decode() -> float:
            into.write(f"{len(PROMPT)} {TOKENS}\n")
            into.flush()
            return float(out.readline())

        yield decode
        into.close()
