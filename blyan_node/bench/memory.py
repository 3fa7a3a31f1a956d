"""`memory`: what publishing, exporting, fetching and holding a model takes of a daemon's memory.

Two models that differ in their number of layers alone, so that the largest tensor is the same, the
small one first, in a network of two daemons: alice publishes and exports, bob fetches and holds.
Measured is the most that a daemon had of its own at a time (pages that belong to no file), beyond
what it had when it was started. Whatever grows with the model shows as a share of what the model
grew by.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blyan_node.bench.footprint import Peaks, footprint
from blyan_node.bench.gpt_oss_20b import write_gpt_oss
from blyan_node.bench.nets import running_net
from blyan_node.bench.rows import Row, row
from blyan_node.testing.daemons import Node
from protocols.ids import parse_subject

LAYERS = (3, 12)
SHAPE: dict[str, object] = {  # 39 MB a layer, of which 35 MB are 32 experts; 8 MB around
    "hidden_size": 1024, "intermediate_size": 672, "num_attention_heads": 16,
    "num_key_value_heads": 2, "vocab_size": 2048,
}  # fmt: skip
SHARE_MAX = 0.25  # of the difference; LevelDB's buffers are not full with the small model
STEP_S = 600
MEGABYTE = 1e6


@dataclass(frozen=True)
class Taken:
    """What a model of `size` bytes took of whom it was done by, in bytes.

    `own` is the most own memory in each piece of work beyond that of a fresh daemon, `files` what
    was resident of packs and of LevelDB's files behind it, `held` what bob held in the end.
    """

    size: int
    own: Mapping[str, int]
    files: Mapping[str, int]
    held: int


def measure() -> list[Row]:
    """Own memory in each piece of work with the large model, beside the small one."""
    small, large = taken()
    return [
        row(
            f"memory {what}",
            "MB of its own",
            large.own[what] / MEGABYTE,
            beside={
                f"with {small.size / MEGABYTE:.0f} MB, not {large.size / MEGABYTE:.0f}": (
                    small.own[what] / MEGABYTE
                ),
                "of files afterwards": large.files[what] / MEGABYTE,
                "the same, small": small.files[what] / MEGABYTE,
            },
            goal=f"grows by at most {SHARE_MAX} of what the model grows by"
            f" (it does by {share(small, large, what):.3f})",
            runs=1,
        )
        for what in large.own
    ]


def share(small: Taken, large: Taken, what: str) -> float:
    """By how much own memory grew for each byte by which the model did."""
    return (large.own[what] - small.own[what]) / (large.size - small.size)


def taken() -> tuple[Taken, Taken]:
    """The small and the large model, one after the other."""
    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        folder = Path(scratch)
        with running_net(folder / "net", ["main", "gpu"], "--hold", "none") as net:
            alice, bob = net["alice"], net["bob"]
            idle = {node.name: footprint(_pid(node)).own for node in (alice, bob)}
            small, large = (_taken(alice, bob, idle, folder, layers) for layers in LAYERS)
    return small, large


def _taken(alice: Node, bob: Node, idle: Mapping[str, int], folder: Path, layers: int) -> Taken:
    name = f"model-{layers}"
    model = write_gpt_oss(folder / name, layers, **SHAPE)
    size = sum(file.stat().st_size for file in model.iterdir())
    own: dict[str, int] = {}
    files: dict[str, int] = {}

    def step(do: Callable[[], object], **by: Node) -> None:
        with Peaks({what: _pid(node) for what, node in by.items()}) as peaks:
            do()
        for what, node in by.items():
            now = footprint(_pid(node))
            own[what] = peaks.peak[what] - idle[node.name]
            files[what] = now.packs + now.tables

    step(partial(alice, "model", "publish", model, "--name", name), publish=alice)
    step(partial(_fetch, bob, name), fetch=bob, serve=alice)
    step(partial(_hold, bob, name), hold=bob)
    step(partial(alice, "model", "export", name, folder / "out" / name), export=alice)
    return Taken(size, own, files, bob("expert", "stats")["memory"]["experts"])


def _fetch(bob: Node, name: str) -> None:
    bob.until("the model", lambda: name in {m["name"] for m in bob("model", "list")["models"]})
    bob("model", "fetch", name, timeout_s=STEP_S)


def _hold(bob: Node, name: str) -> None:
    subjects = bob("model", "show", name)["subjects"]
    experts = [one for one in subjects if parse_subject(one).expert is not None]
    bob("expert", "hold", "--model", name, *experts, timeout_s=STEP_S)


def _pid(node: Node) -> int:
    assert node.pid is not None
    return node.pid
