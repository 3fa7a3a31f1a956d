"""`scale`: a model of gpt-oss-20b's true shapes over one main and three gpu nodes.

Four of its 24 layers, 4.2 GB: written, published, spread and answered from by real daemons. It
takes some minutes, and 20 GB of disk while it runs, in the folder for temporary files (`TMPDIR`);
so it runs only when it is named. Each time is of one go. The tokens are checked on the way: no
expert is computed by the main node, all logits are finite, and the answer begins with the greatest.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blyan_node.bench.footprint import Footprint, Peaks, footprint
from blyan_node.bench.gpt_oss_20b import CONFIG, write_gpt_oss
from blyan_node.bench.nets import running_net
from blyan_node.bench.publishing import copy
from blyan_node.bench.rows import Row, row, seconds
from blyan_node.moe.safetensors_file import read_header
from blyan_node.testing.daemons import Node
from protocols.errors import ErrorCode, Refused
from protocols.ids import parse_subject

NAME = "gpt-oss"
LAYERS = 4
CHANGES: dict[str, object] = {}  # of the release's configuration; tests make it small
ROLES = ["main", "gpu", "gpu", "gpu"]
MEMORY = "3GiB"
REPLICAS = 2  # what nodes aim for
DISK_BYTES = 20_000_000_000
PROMPT = [7919 * n % 200_000 for n in range(1, 161)]  # longer than the window
DECODED_TOKENS = 24
STEP_S = 1800
SAMPLE_S = 0.1
MEGABYTE = 1e6
READ_BYTES = 1 << 28
KERNELS = "ratio >= 0.45 with the contract kernels, a later step"

Json = dict[str, Any]


@dataclass(frozen=True)
class _Answered:
    """One answer as it was seen from outside; `stats` are the node's own."""

    token_ids: list[int]
    stats: Json
    trace: Json
    seconds: float


def measure() -> Iterator[Row]:
    """Times of each step, and the memory of each node beside what it holds."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="blyan-bench-")))
        _require_disk(scratch)
        model = write_gpt_oss(scratch / "model", LAYERS, **CHANGES)
        size = sum(file.stat().st_size for file in model.iterdir())
        copied = seconds(partial(copy, model, scratch / "copy"))
        shutil.rmtree(scratch / "copy")
        net = stack.enter_context(running_net(scratch / "net", ROLES, "--memory", MEMORY))
        pids = {name: node.pid for name, node in net.nodes.items() if node.pid}
        idle = {name: footprint(pid).own for name, pid in pids.items()}
        peaks = stack.enter_context(Peaks(pids, SAMPLE_S))
        yield from _published(net["alice"], model, size, copied)
        shutil.rmtree(model)
        yield from _answers(net["alice"], scratch)
        for name, node in net.nodes.items():
            stats, now = node("expert", "stats"), footprint(pids[name])
            yield _memory(name, stats, now, {"idle": idle[name], "peak": peaks.peak[name]})


def _require_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        raise Refused(
            ErrorCode.DISK_FULL,
            "scale was not measured",
            f"it takes {DISK_BYTES} bytes in {folder.parent}, where {free} are free",
            "Free some space, or set TMPDIR to a folder that has it.",
            {"path": str(folder.parent), "bytes": DISK_BYTES, "free": free},
        )


def _published(alice: Node, model: Path, size: int, copied: float) -> Iterator[Row]:
    """The model becomes blocks, and every expert gets one holder, and then all that it should."""
    publish = partial(alice, "model", "publish", model, "--name", NAME, timeout_s=STEP_S)
    rate = size / MEGABYTE / seconds(publish)
    beside = {"plain copy with fsync": size / MEGABYTE / copied}
    yield _row("publish", "MB/s", rate, beside, "ratio >= 0.8 on an idle machine")
    for replicas in (1, REPLICAS):
        wait = partial(alice, "model", "wait", NAME, "--replicas", replicas, timeout_s=STEP_S)
        yield _row(f"{replicas} of each expert", "s", seconds(wait))


def _answers(alice: Node, scratch: Path) -> list[Row]:
    """The first token, with the trunk to be loaded and without, and further ones."""
    cold, warm = (_answer(alice, PROMPT, 1) for _ in range(2))
    answer = _answer(alice, PROMPT[:16], DECODED_TOKENS)
    for one in (cold, warm, answer):
        _require(_computed_elsewhere(alice, one), "the main node computed experts itself")
    _require(cold.token_ids == warm.token_ids, "the same prompt has two answers")
    logits = _logits(alice, PROMPT[:16], scratch / "logits.safetensors")
    _require(bool(np.isfinite(logits).all()), "not all logits are finite")
    _require(int(logits[-1].argmax()) == answer.token_ids[0], "the answer is not the greatest")
    loaded = {"with the trunk loaded": warm.seconds}
    limit = {"one thread reading the weights of a token": _readings_per_s(alice)}
    return [
        _row("first token", "s", cold.seconds, loaded),
        _row("prefill", "tokens/s", len(PROMPT) / warm.stats["prefill_s"]),
        _row("decode", "tokens/s", answer.stats["tokens_per_s"], limit, KERNELS),
    ]


def _memory(name: str, stats: Json, now: Footprint, own: dict[str, int]) -> Row:
    """One node at rest after all that: what is resident beside what it holds."""
    took = stats["memory"]
    beside = {
        "held": took["experts"] + took["trunks"],
        "of its packs": now.packs,
        "of LevelDB's files": now.tables,
        "of programs": now.programs,
        "its own": now.own,
        "its own at most": own["peak"],
        "its own when idle": own["idle"],
        "copied by loading": took["copied"],
    }
    about = f"{name}, {len(stats['experts'])} experts" + ", trunk" * bool(took["trunks"])
    megabytes = {what: value / MEGABYTE for what, value in beside.items()}
    goal = "packs within what is held, its own the same for every model, nothing copied"
    return _row(f"memory ({about})", "MB", now.total / MEGABYTE, megabytes, goal)


def _readings_per_s(alice: Node) -> float:
    """How often a second this machine reads what one token meets: all but most experts."""
    subjects: Json = alice("model", "show", NAME)["subjects"]
    parts = {parse_subject(name): about["bytes"] for name, about in subjects.items()}
    (expert, *_) = (size for part, size in parts.items() if part.expert is not None)
    trunk = sum(size for part, size in parts.items() if part.expert is None)
    embedding = next(size for part, size in parts.items() if part.kind == "embed")
    met = trunk - embedding + LAYERS * CONFIG["num_experts_per_tok"] * expert
    values = np.ones(READ_BYTES // 8, np.int64)
    return READ_BYTES / min(seconds(values.max) for _ in range(5)) / float(met)


def _answer(alice: Node, prompt: list[int], tokens: int) -> _Answered:
    words = ("--prompt-ids", ",".join(map(str, prompt)), "--max-tokens", tokens)
    begun = time.monotonic()
    done = alice(
        "generate", "--model", NAME, *words, "--temperature", 0, "--ignore-eos", timeout_s=STEP_S
    )
    return _Answered(done["token_ids"], done["stats"], done["trace"], time.monotonic() - begun)


def _computed_elsewhere(alice: Node, answer: _Answered) -> bool:
    experts = [one for name, one in answer.trace.items() if parse_subject(name).expert is not None]
    return bool(experts) and all(alice.peer_id not in one["peers"] for one in experts)


def _logits(alice: Node, prompt: list[int], out: Path) -> npt.NDArray[np.float32]:
    words = ("--prompt-ids", ",".join(map(str, prompt)), "--out", out)
    alice("forward", "--model", NAME, *words, timeout_s=STEP_S)
    stored = read_header(out)["logits"]
    return np.memmap(out, "<f4", "r", stored.begin, stored.shape)


def _row(
    name: str,
    unit: str,
    value: float,
    beside: Mapping[str, float] | None = None,
    goal: str = "none is set",
) -> Row:
    return row(f"scale {name}", unit, value, beside=dict(beside or {}), goal=goal, runs=1)


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Refused(ErrorCode.INTERNAL, "the answer is wrong", otherwise)
