"""`quality`: what a model loses when its matrices are held in a narrower precision.

Beside the model as it was published, whose bits are those of its weights in float32: perplexity of
a text, how often the likeliest next token of it is the same, and how many greedy tokens are the
same before the first that differs. Numbers are exact for a profile: no run differs from another.

Real text with the demo's model, if `make demo` has made it in this folder. Every family as well,
with the tests' tiny models, on text of their own (sampled from what was published). Their weights
are random and large: rounding does to them far more than to a model that was trained.
"""

import importlib.util
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from blyan_node.bench.passage import PASSAGE
from blyan_node.bench.rows import Row, row
from blyan_node.moe.arithmetic import Arithmetic, choose
from blyan_node.moe.arrays import array_of, tensor_of
from blyan_node.moe.cache import KVCache
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.sampling import Sampler, Sampling
from blyan_node.moe.text import Text
from blyan_node.testing.engine import Engine
from protocols.errors import RemoteProtocolError
from protocols.precision import PUBLISHED, Precision

DEMO = Path(".demo", "smollm2")
FAMILIES = ("gpt_oss", "mixtral", "qwen3_moe", "olmoe", "deepseek_v3")
DEMO_PRECISIONS: tuple[Precision, ...] = ("fp8", "int8")  # it is published in bfloat16
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "float16", "fp8", "int8")
GREEDY_TOKENS, TINY_TOKENS = 64, 192
_WORSE_MAX = {
    "float32": 1.0,
    "bfloat16": 1.01,
    "float16": 1.01,
    "fp8": 1.05,
    "int8": 1.02,
}  # of perplexity


Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Said:
    """What a model says of a text: logits [tokens, vocab], and how it goes on."""

    logits: Logits
    goes_on: list[int]


class Model:
    """A whole model in this process, in one precision."""

    def __init__(
        self, checkpoint: Checkpoint, arithmetic: Arithmetic, precision: Precision
    ) -> None:
        self._engine = Engine(checkpoint.config, checkpoint.load, arithmetic, precision)
        self._composed = Random(1)

    def say(self, ids: Sequence[int], tokens: int, sampler: Sampler) -> Said:
        """Passes a text, then goes on for so many tokens."""
        trunk = self._engine.trunk
        cache = trunk.new_cache(len(ids) + tokens)
        cuts = trunk.prefill_cuts(0, len(ids))
        logits = np.concatenate([self._pass(ids[first:last], cache) for first, last in cuts])
        new, row_now = list[int](), logits[-1]
        for _ in range(tokens):
            new.append(sampler.pick(tensor_of(row_now)))
            row_now = self._pass(new[-1:], cache)[-1]
        return Said(logits, new)

    def _pass(self, ids: Sequence[int], cache: KVCache) -> Logits:
        (logits,) = self._engine.forward([(cache, ids)], self._composed)
        return array_of(logits).copy()


def measure() -> Iterator[Row]:
    """The rows of the demo's model, if it is there, and of each family's tiny one.

    Raises `RemoteProtocolError` if there are neither.
    """
    arithmetic = choose(folder=user_folder())
    if DEMO.is_dir():
        checkpoint = Checkpoint.open(DEMO)
        ids = Text(checkpoint.files).encode(PASSAGE)
        yield from compared("smollm2", checkpoint, ids, arithmetic, DEMO_PRECISIONS)
    if not importlib.util.find_spec("transformers"):  # which makes the tiny models
        if not DEMO.is_dir():
            raise RemoteProtocolError(
                "bench quality",
                "there is no model: `make demo` makes one here, and the tiny ones need"
                " pip install 'blyan-node[test]'",
            )
        return
    from blyan_node.testing.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        for family in FAMILIES:
            checkpoint = Checkpoint.open(make_checkpoint(family, Path(scratch, family)))
            published = Model(checkpoint, arithmetic, PUBLISHED)
            text = published.say([3], TINY_TOKENS, Sampler(Sampling(1.0), 1)).goes_on
            yield from compared(family, checkpoint, [3, *text], arithmetic, PRECISIONS)


def compared(
    name: str,
    checkpoint: Checkpoint,
    ids: Sequence[int],
    arithmetic: Arithmetic,
    precisions: Sequence[Precision],
) -> Iterator[Row]:
    """Three rows for each precision, beside the model as it was published."""
    truth = Model(checkpoint, arithmetic, PUBLISHED).say(ids, GREEDY_TOKENS, Sampler())
    for precision in precisions:
        said = Model(checkpoint, arithmetic, precision).say(ids, GREEDY_TOKENS, Sampler())
        here = f"quality {name} {precision}"
        yield row(
            f"{here} perplexity",
            "",
            perplexity(said.logits, ids),
            beside={PUBLISHED: perplexity(truth.logits, ids)},
            goal=f"ratio <= {_WORSE_MAX[precision]} for a trained model",
            runs=1,
        )
        same = np.mean(said.logits.argmax(-1) == truth.logits.argmax(-1))
        yield row(
            f"{here} agreement",
            "of greedy tokens",
            float(same),
            beside={PUBLISHED: 1.0},
            goal="near 1",
            runs=1,
        )
        yield row(
            f"{here} continuation",
            "tokens before one differs",
            beginning(said.goes_on, truth.goes_on),
            beside={PUBLISHED: float(GREEDY_TOKENS)},
            goal="near 1",
            runs=1,
        )


def perplexity(logits: Logits, ids: Sequence[int]) -> float:
    """e to the mean of the negative log likelihood of each token after those before it."""
    rows = logits[:-1].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    likely = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    return float(np.exp(-likely[np.arange(len(rows)), list(ids[1:])].mean()))


def beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return number
    return len(one)
