"""`decode-parts`: where the time of a token goes, by part of the layers, in this process.

The whole model on one thread, without the services around it and without sampling. Beside each
part: how long its weights take to read. What is in no part is Python and torch between the kernels.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from blyan_node.bench.decoding import READ_BYTES
from blyan_node.bench.models import write_model
from blyan_node.bench.rows import Row, row, seconds
from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.cache import KVCache
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import GroupedAttention, ModelConfig, MoeFeed
from blyan_node.moe.contract import Contract
from blyan_node.moe.kernels.library import load
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.testing.engine import Engine
from protocols.ids import expert_subject
from protocols.precision import PUBLISHED, Precision
from protocols.tensors.manifest import Dtype

PROMPT_TOKENS, TOKENS = 16, 48
# Parts of a layer by the function that the trunk and the experts give the arithmetic to repeat.
_STEPS = {"before": "projections", "after": "output and router", "_compute": "experts"}
_TIMED = {"rotate": "attention", "attend": "attention"}
_GOAL = "near 1: reading is the limit"

Spent = dict[str, float]


class Timed:
    """An `Arithmetic` that notes how long each part took, in s."""

    def __init__(self, inner: Arithmetic, spent: Spent) -> None:
        self._inner, self._spent = inner, spent

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return partial(timed, self._spent, _TIMED[name], found) if name in _TIMED else found

    def steps(self, function: Callable[..., tuple[Tensor, ...]]) -> Any:
        """Notes the time of the function under its part."""
        part = _STEPS[function.__name__]
        return partial(timed, self._spent, part, self._inner.steps(function))


def timed(spent: Spent, part: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Calls the function and adds the time that it takes to its part's."""
    started = time.perf_counter()
    found = function(*given, **named)
    spent[part] = spent.get(part, 0.0) + time.perf_counter() - started
    return found


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
    kernels, memory = load(user_folder()), torch.ones(READ_BYTES // 4)
    spent: Spent = {}
    checkpoint = Checkpoint.open(model)
    arithmetic = cast(Arithmetic, Timed(Contract(kernels), spent))
    engine = Engine(checkpoint.config, checkpoint.load, arithmetic, precision)
    cache, taken, reading = engine.trunk.new_cache(), [], []
    state = engine.trunk.embed(range(3, 3 + PROMPT_TOKENS))
    token = _token(engine, cache, state, spent)
    for _ in range(TOKENS):
        spent.clear()
        started = time.perf_counter()
        token = _token(engine, cache, engine.trunk.embed([token]), spent)
        spent["all"] = time.perf_counter() - started
        taken.append(dict(spent))
        reading.append(seconds(lambda: kernels.read(memory, READ_BYTES)) / READ_BYTES)
    medians = {part: statistics.median(one[part] for one in taken) for part in taken[0]}
    medians["between them"] = 2 * medians["all"] - sum(medians.values())
    weights = weights_of(checkpoint.config)
    second = statistics.median(reading) * weight_bytes
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


def _token(engine: Engine, cache: KVCache, x: Tensor, spent: Spent) -> int:
    """The next token after these rows."""
    trunk = engine.trunk
    for layer in range(len(engine.config.layers)):
        attended = trunk.attend(layer, x, cache)
        assert attended.routed is not None
        normed, chosen = attended.routed.normed, attended.routed.experts
        rows = torch.empty(*chosen.shape, engine.config.hidden)
        for row_, experts in enumerate(chosen.tolist()):
            for rank, number in enumerate(experts):
                expert = engine.experts[expert_subject(layer, number)]
                rows[row_, rank] = expert.apply(normed[row_ : row_ + 1])[0]
        x = trunk.combine(attended, rows)
    return int(timed(spent, "head", trunk.logits, x[-1:]).argmax())
