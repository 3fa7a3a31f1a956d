"""`decode-float32`, `decode-16bit`, `decode-8bit`: tokens/s of one process on one thread.

Ours is a daemon that holds the whole model, asked over its RPC. Beside it, in turn: llama.cpp and
transformers on the same weights, and how often in a second memory could be read as far as a token
needs it.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from blyan_node.bench import peers
from blyan_node.bench.models import write_model
from blyan_node.bench.nets import PROMPT, decode_rate, serving_net
from blyan_node.bench.rows import Row, alternate, row, seconds
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.config import MoeFeed
from blyan_node.moe.families import layout
from blyan_node.moe.kernels.library import Kernels, load
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.pages import pages
from blyan_node.testing.daemons import Testnet
from protocols.dag.header import Kind
from protocols.ids import parse_subject
from protocols.precision import PUBLISHED, Precision
from protocols.tensors.manifest import Dtype

RUNS = 5
TOKENS = 48
READ_BYTES = 64 << 20
TRANSFORMERS, MEMORY = "transformers float32", "reading its weights"


@dataclass(frozen=True)
class Case:
    """One precision: how the model is published and held, and what is beside it."""

    name: str
    published: Dtype
    precision: Precision
    weight_bytes: int
    llama: tuple[str, ...]  # kinds of GGML's, the one that the goal names first
    goal: str


FLOAT32 = Case("decode-float32", Dtype.F32, PUBLISHED, 4, ("F32",), ">= 1.0, 2.4, 0.6")
SIXTEEN = Case("decode-16bit", Dtype.BF16, PUBLISHED, 2, ("F16", "BF16"), ">= 1.1, 1.1, 4, 0.6")
EIGHT = Case("decode-8bit", Dtype.BF16, "int8", 1, ("Q8_0",), ">= 1.5, 8, 0.6")


def float32() -> list[Row]:
    """Float32 weights, as published."""
    return [_measure(FLOAT32)]


def sixteen_bit() -> list[Row]:
    """Bfloat16 weights, as published; llama.cpp has them in either form of 16 bits."""
    return [_measure(SIXTEEN)]


def eight_bit() -> list[Row]:
    """The same weights held in int8; llama.cpp has its own 8 bits of them."""
    return [_measure(EIGHT)]


def _measure(case: Case) -> Row:
    with loaded(case) as (net, beside, model):
        measures: dict[str, Callable[[], float]] = {"ours": lambda: decode_rate(net, TOKENS)}
        for name, peer in beside.items():
            if peer is not None:
                measures[name] = lambda peer=peer: peer.run(len(PROMPT), TOKENS).decode  # type: ignore[misc]
        measures[MEMORY] = _reading(token_weights(model) * case.weight_bytes)
        medians = alternate(RUNS, **measures)
    return row(
        case.name,
        "tokens/s",
        medians["ours"],
        beside={name: medians.get(name) for name in (*beside, MEMORY)},
        goal=f"{case.goal} times these, in their order",
        runs=RUNS,
    )


@contextmanager
def loaded(
    case: Case, dtype: str = "float32"
) -> Iterator[tuple[Testnet, dict[str, peers.Peer | None], Path]]:
    """A daemon, the peers by what they are called, and the model's directory."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blyan-bench-")))
        model = write_model(scratch / "model", case.published)
        net = serving_net(scratch / "net", model, ["main"], hold="auto", precision=case.precision)
        beside = {
            f"llama.cpp {kind}": stack.enter_context(peers.llama_cpp(model, kind))
            for kind in case.llama
        }
        beside[f"transformers {dtype}"] = stack.enter_context(peers.transformers(model, dtype))
        yield stack.enter_context(net), beside, model


def token_weights(model: Path) -> int:
    """How many weights of matrices one token takes part in, its embedding not counted."""
    config = Checkpoint.open(model).config
    count = prod((config.vocab, config.hidden)) if config.tied else 0
    for part in layout(config):
        sizes = sum(prod(tensor.shape) for tensor in part.tensors if len(tensor.shape) > 1)
        if part.kind is Kind.EXPERT:
            feed = config.layers[parse_subject(part.subject).layer or 0].feed
            assert isinstance(feed, MoeFeed)
            count += sizes * feed.top_k // feed.experts
        elif part.subject != "embed":
            count += sizes
    return count


def _reading(size: int) -> Callable[[], float]:
    """How often in a second so many bytes can be read, by one thread that does nothing else."""
    byte_s = reading(load(user_folder()))
    return lambda: 1 / (size * byte_s())


def reading(kernels: Kernels) -> Callable[[], float]:
    """How many s a byte takes to be read, out of memory as weights lie in it."""
    memory = pages.empty(1, READ_BYTES, torch.uint8).fill_(1)

    def byte_s() -> float:
        kernels.read(memory, READ_BYTES)  # the system may have taken what was idle for a minute
        return seconds(lambda: kernels.read(memory, READ_BYTES)) / READ_BYTES

    return byte_s
