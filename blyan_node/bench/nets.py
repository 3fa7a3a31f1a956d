"""Networks of real daemons to measure with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blyan_node.testing.daemons import Testnet
from blyan_node.testnet import state

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
    folder: Path, model: Path, roles: list[str], *, hold: str | None = None
) -> Iterator[Testnet]:
    """A network in which every expert of `model` is held once."""
    options = ["--memory", MEMORY, *(["--hold", hold] if hold else [])]
    with running_net(folder, roles, *options) as net:
        net["alice"]("model", "publish", model, "--name", NAME, "--wait-replicas", 1)
        yield net


def decode_rate(net: Testnet, tokens: int) -> float:
    """Tokens/s of one answer, the prompt's pass not counted."""
    request = {
        "model": NAME,
        "prompt_ids": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    rate: float = net["alice"].call("generate.run", request)["stats"]["tokens_per_s"]
    return rate
