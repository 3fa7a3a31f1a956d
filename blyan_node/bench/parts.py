"""`decode-parts`: where the time of a token goes, by part of the layers, in this process.

The whole model on one thread, without the services around it and without sampling. Beside each
part: how long its weights take to read. A token is one native call; to see its parts, every second
token is made span by span. What is between them is Python, the calls of the spans included.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from blyan_node.bench.decoding import reading
from blyan_node.bench.models import write_model
from blyan_node.bench.rows import Row, row
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import GroupedAttention, ModelConfig, MoeFeed
from blyan_node.moe.contract import Contract
from blyan_node.moe.here import Here
from blyan_node.moe.kernels.library import load
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.kernels.program import Program
from blyan_node.testing.engine import Engine
from protocols.precision import PUBLISHED, Precision
from protocols.tensors.manifest import Dtype

PROMPT_TOKENS, TOKENS = 16, 48
_GOAL = "near 1: reading is the limit"

Spent = dict[str, float]


class Timed(Program):
    """A program that notes how long each part of what it walks took, in s."""

    def __init__(self, inner: Program) -> None:
        self.__dict__.update(inner.__dict__)
        self.spent: Spent = {}

    def walk(self, first: int, last: int) -> int | None:
        """The same span by span."""
        for begin, end, part in self.parts():
            if first < end and begin < last:
                started = time.perf_counter()
                stopped = super().walk(max(first, begin), min(last, end))
                taken = time.perf_counter() - started
                self.spent[part] = self.spent.get(part, 0.0) + taken
                if stopped is not None:
                    return stopped
        return None


def measure() -> list[Row]:
    """The parts in bfloat16, and in int8."""
    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        model = write_model(Path(scratch, "model"), Dtype.BF16)
        return [
            *parts(model, PUBLISHED, 2, "bfloat16"),
            *parts(model, "int8", 1, "int8"),
        ]


def parts(model: Path, precision: Precision, weight_bytes: int, name: str) -> list[Row]:
    """The rows of one precision."""
    torch.set_num_threads(1)
    kernels = load(user_folder())
    byte_s = reading(kernels)
    checkpoint = Checkpoint.open(model)
    engine = Engine(checkpoint.config, checkpoint.load, Contract(kernels), precision)
    trunk, here = engine.trunk, Here(engine.config, engine.experts_by_place())
    assert trunk.token is not None
    cache, whole = trunk.new_cache(PROMPT_TOKENS + 2 * TOKENS + 1), trunk.token.program
    by_part, token = Timed(whole), 3
    taken, read = [], []
    for number in range(PROMPT_TOKENS + 2 * TOKENS):
        trunk.token.program = by_part if number % 2 else whole
        by_part.spent.clear()
        started = time.perf_counter()
        logits = trunk.enter([token], cache, here, slice(None))
        whole_s = time.perf_counter() - started
        by_part.spent["between them"] = whole_s - sum(by_part.spent.values())
        by_part.spent["all"] = whole_s
        assert isinstance(logits, torch.Tensor)
        token = int(logits.argmax())
        if number >= PROMPT_TOKENS:
            taken.append(dict(by_part.spent))
            read.append(byte_s())
    medians = {part: statistics.median(one[part] for one in taken[1::2]) for part in taken[1]}
    medians["all"] = statistics.median(one["all"] for one in taken[::2])
    weights = weights_of(checkpoint.config)
    second = statistics.median(read) * weight_bytes
    return [
        row(
            f"decode-parts {name}, {part}",
            "ms/token",
            1e3 * value,
            beside={"reading its weights": 1e3 * second * weights[part]} if part in weights else {},
            goal=_GOAL if part in weights else "little",
            runs=TOKENS,
        )
        for part, value in sorted(medians.items(), key=lambda item: -item[1])
    ]


def weights_of(config: ModelConfig) -> dict[str, int]:
    """How many weights of matrices a token takes part in, by part."""
    found = {"head": config.vocab * config.hidden}
    for layer in config.layers:
        attention, feed = layer.attention, layer.feed
        assert isinstance(attention, GroupedAttention) and isinstance(feed, MoeFeed)
        width, hidden = attention.head_dim, config.hidden
        sizes = {
            "projections": hidden * width * (attention.heads + 2 * attention.kv_heads),
            "output and router": hidden * (width * attention.heads + feed.experts),
            "experts": feed.top_k * 3 * hidden * feed.intermediate,
        }
        for part, size in sizes.items():
            found[part] = found.get(part, 0) + size
    return found | {"all": sum(found.values())}
