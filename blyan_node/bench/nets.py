"""Networks of real daemons to measure with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blyan_node.testing.daemons import Testnet
from blyan_node.testnet import state
from protocols.precision import PUBLISHED, Precision

NAME = "bench"
PROMPT = list(range(3, 19))
MEMORY = "4GiB"


@contextmanager
def running_net(folder: Path, roles: list[str], *options: str) -> Iterator[Testnet]:
    """Daemons with these roles, connected to each other; gone at the end."""
    net = Testnet(folder)
    try:
        net.run("up", "--nodes", str(len(roles)), "--roles", ",".join(roles), *options)
        yield net
    finally:
        if (folder / state.FILE).exists():  # else none was started
            net.run("down")


@contextmanager
def serving_net(
    folder: Path,
    model: Path,
    roles: list[str],
    *,
    hold: str | None = None,
    precision: Precision = PUBLISHED,
) -> Iterator[Testnet]:
    """A network in which every expert of `model` is held once."""
    options = ["--memory", MEMORY, "--precision", precision, *(["--hold", hold] if hold else [])]
    with running_net(folder, roles, *options) as net:
        net["alice"]("model", "publish", model, "--name", NAME, "--wait-replicas", 1)
        yield net


def decode_rate(net: Testnet, tokens: int) -> float:
    """Tokens/s of one answer, the prompt's pass not counted."""
    rate: float = answer(net, PROMPT, tokens)["tokens_per_s"]
    return rate


def prefill_rate(net: Testnet, prompt: int) -> float:
    """Tokens/s of the pass over a prompt of so many tokens: 3, 4, 5, …"""
    stats = answer(net, list(range(3, 3 + prompt)), 1)
    return prompt / float(stats["prefill_s"])


def answer(net: Testnet, prompt: list[int], tokens: int) -> dict[str, Any]:
    """The stats of one greedy answer of so many tokens."""
    request = {
        "model": NAME,
        "prompt_ids": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    stats: dict[str, Any] = net["alice"].call("generate.run", request)["stats"]
    return stats
