"""`decode-swarm`: tokens/s over one main and three gpu nodes, beside one node that holds all."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from blyan_node.bench.models import write_model
from blyan_node.bench.nets import decode_rate, serving_net
from blyan_node.bench.rows import Row, alternate, row
from protocols.tensors.manifest import Dtype

RUNS = 5
TOKENS = 48


def measure() -> list[Row]:
    """The same bfloat16 model in two networks of real daemons on loopback."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blyan-bench-")))
        model = write_model(scratch / "model", Dtype.BF16)
        one = stack.enter_context(serving_net(scratch / "one", model, ["main"], hold="auto"))
        roles = ["main", "gpu", "gpu", "gpu"]
        many = stack.enter_context(serving_net(scratch / "many", model, roles))
        medians = alternate(
            RUNS,
            many=lambda: decode_rate(many, TOKENS),
            one=lambda: decode_rate(one, TOKENS),
        )
    beside = {"one node that holds everything": medians["one"]}
    goal = "ratio >= 0.7 (with the dedicated data plane, a later step)"
    return [row("decode-swarm", "tokens/s", medians["many"], beside=beside, goal=goal, runs=RUNS)]
