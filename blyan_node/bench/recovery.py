"""`recovery`: how long until a node is back after its link was cut, and after it has moved.

Three daemons in network namespaces; while the link is cut, the main node goes on asking a model
whose experts another node holds as well. A request that is lost ends the measurement.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from blyan_node.bench.rows import Row, row
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.lan_swarm import LanSwarm, lan_swarm
from blyan_node.testing.namespaces import unavailable
from protocols.errors import ErrorCode, Refused
from protocols.limits import advert_lifetime_s, redial_s_max, silence_s_max

CUT_S = 180
SUBNET = "10.81.6"
GPUS = ("bob", "carol")


def measure() -> Iterator[Row]:
    """Rows of one run: each of these takes minutes."""
    if reason := unavailable():
        raise Refused(
            ErrorCode.BAD_INPUT,
            "recovery cannot be measured here",
            reason,
            "run it where people may make network namespaces",
        )
    with tempfile.TemporaryDirectory(prefix="blyan-bench-") as scratch:
        model = make_checkpoint("mixtral", Path(scratch) / "tiny")
        with lan_swarm(SUBNET, Path(scratch)) as swarm:
            swarm.start("alice", "main")
            for name in GPUS:
                swarm.start(name, "gpu")
            swarm.until("connected", lambda: swarm.peers("alice") == {*GPUS})
            swarm.publish(model, GPUS)
            truth = swarm.answer()[0]
            yield from _cut(swarm, truth)
            yield _move(swarm, truth)


def _cut(swarm: LanSwarm, truth: list[int]) -> Iterator[Row]:
    """Bob without a link for `CUT_S`, with requests all the time."""
    swarm.net.unplug("bob")
    began, noticed_s, slowest_s = time.monotonic(), 0.0, 0.0
    while (passed := time.monotonic() - began) < CUT_S:
        asked = time.monotonic()
        _same(swarm.answer()[0], truth)
        slowest_s = max(slowest_s, time.monotonic() - asked)
        if not noticed_s and "bob" not in swarm.peers("alice"):
            noticed_s = passed
    swarm.net.plug("bob")
    back_s = swarm.until("back", lambda: swarm.peers("alice") == {*GPUS})
    meshed_s = back_s + swarm.until("meshed", lambda: swarm.peers("bob") == {"alice", "carol"})
    at_work_s = meshed_s + swarm.until("at work", lambda: "bob" in swarm.answer()[1])
    yield _row("cut-noticed", noticed_s, "silence is noticed after", silence_s_max, "<= 16 s")
    yield _row("cut-answer", slowest_s, "an advert lives for", advert_lifetime_s, "every one right")
    yield _row("cut-back", back_s, "the longest pause between dials", redial_s_max, "<= 45 s")
    yield _row("cut-meshed", meshed_s, "the longest pause between dials", redial_s_max, "<= 90 s")
    yield _row("cut-at-work", at_work_s, "the longest pause between dials", redial_s_max, "<= 90 s")


def _move(swarm: LanSwarm, truth: list[int]) -> Row:
    """Carol gets another address; her connections are not told."""
    swarm.move("carol", f"{SUBNET}.99")
    began = time.monotonic()
    swarm.until("meshed", lambda: _addresses(swarm) == {"alice", "bob"})
    _same(swarm.answer()[0], truth)
    return _row(
        "moved", time.monotonic() - began, "silence is noticed after", silence_s_max, "<= 60 s"
    )


def _addresses(swarm: LanSwarm) -> set[str]:
    """Who knows carol by her new address."""
    carol, knowing = swarm.nodes["carol"].peer_id, set()
    for name, node in swarm.nodes.items():
        peers = {peer["peer_id"]: peer["addrs"] for peer in node.call("node.peers")["peers"]}
        if any(f"/{SUBNET}.99/" in addr for addr in peers.get(carol, [])):
            knowing.add(name)
    return knowing


def _same(tokens: list[int], truth: list[int]) -> None:
    if tokens != truth:
        raise AssertionError(f"an answer differs: {tokens}, not {truth}")


def _row(name: str, value: float, what: str, limit: float, goal: str) -> Row:
    return row(f"recovery-{name}", "s", value, beside={what: limit}, goal=goal, runs=1)
