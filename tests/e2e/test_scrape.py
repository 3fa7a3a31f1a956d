"""A scrape during load: the numbers move while answers are made, and agree with what they cost."""

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Node, blyan
from blyan_node.testing.foreground import Foreground
from protocols.errors import ErrorCode
from protocols.metrics import METRICS

PROMPT = [3, 17, 42, 5, 9, 23, 31, 8]
NEW = 120
ANSWERS = 4

Labels = frozenset[tuple[str, str]]


class Numbers(dict[tuple[str, Labels], float]):
    """One scrape, by series."""

    def sum(self, name: str, **labels: str) -> float:
        """The sum of the series of `name` that have `labels`."""
        found = [v for (n, on), v in self.items() if n == name and labels.items() <= set(on)]
        return sum(found)


def scrape(url: str) -> Numbers:
    """Reads a node's metrics as Prometheus does."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    numbers = Numbers()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {f.removesuffix("_total") for f in METRICS} == set(families)
    for row in METRICS.values():
        family = families[row.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (row.kind, row.help)
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in numbers, "a series is there twice"
            assert set(sample.labels) - {"le"} == set(row.labels)
            numbers[key] = sample.value
    return numbers


@dataclass
class Scraper:
    """Scrapes one node over and over, in a thread of its own, until the block ends."""

    url: str
    seen: list[Numbers] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Scraper":
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.seen.append(scrape(self.url))


@dataclass
class Watched:
    """A main node and two that hold the experts of its model; each shows its metrics."""

    nodes: dict[str, Node]
    urls: dict[str, str]

    def scrape(self, name: str) -> Numbers:
        return scrape(self.urls[name])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    blyan("network", "new", "--name", "watched", "--out", folder / "network.json")
    common = ("--network", folder / "network.json", "--metrics", "127.0.0.1:0", "--memory", "1GiB")
    with ExitStack() as stack:
        start: Callable[..., Node] = lambda name, *more: stack.enter_context(  # noqa: E731
            Foreground(folder / name, *common, *more)
        )
        alice = start("alice", "--role", "main")
        others = ("--role", "gpu", "--bootstrap", alice.addrs[0])
        nodes = {"alice": alice, "bob": start("bob", *others), "carol": start("carol", *others)}
        path = make_checkpoint("mixtral", folder / "model")
        alice("model", "publish", path, "--name", "tiny", "--wait-replicas", 2)
        yield Watched(nodes, {n: node.call("metrics.read")["url"] for n, node in nodes.items()})


def _generate(node: Node) -> dict[str, Any]:
    answer: dict[str, Any] = node(
        "generate", "--model", "tiny", "--prompt-ids", ",".join(map(str, PROMPT)),
        "--max-tokens", NEW, "--temperature", 0, "--ignore-eos",
    )  # fmt: skip
    return answer


def test_the_numbers_agree_with_what_the_answers_say_of_themselves(watched: Watched) -> None:
    alice = watched.nodes["alice"]
    before = watched.scrape("alice")
    with ThreadPoolExecutor(ANSWERS) as pool, ExitStack() as stack:
        scrapers = {n: stack.enter_context(Scraper(url)) for n, url in watched.urls.items()}
        answers = list(pool.map(lambda _: _generate(alice), range(ANSWERS)))
    after = watched.scrape("alice")

    def grown(name: str, **labels: str) -> float:
        return after.sum(name, **labels) - before.sum(name, **labels)

    def said(key: str) -> int:
        return sum(answer["stats"][key] for answer in answers)

    assert grown("blyan_tokens_total", kind="new") == said("new_tokens") == ANSWERS * NEW
    assert grown("blyan_tokens_total", kind="prompt") == said("prompt_tokens")
    assert grown("blyan_expert_calls_total") == said("remote_calls") > 0
    assert grown("blyan_expert_retries_total") == said("retries")
    assert grown("blyan_expert_bytes_total", direction="out") == said("bytes_sent") > 0
    assert grown("blyan_expert_bytes_total", direction="in") == said("bytes_received") > 0
    assert grown("blyan_requests_total", outcome="length") == ANSWERS
    assert grown("blyan_first_token_seconds_count") == ANSWERS
    assert grown("blyan_token_gap_seconds_count") == ANSWERS * (NEW - 1)
    layers = {dict(on)["layer"] for (n, on) in after if n == "blyan_layer_seconds_count"}
    passes = {grown("blyan_layer_seconds_count", layer=layer) for layer in layers}
    assert len(layers) > 1 and passes == {ANSWERS * NEW}, "each pass goes through each layer"
    expert = "/blyan/expert/1"
    assert grown("blyan_network_requests_total", protocol=expert, direction="out") == said(
        "remote_calls"
    )
    assert grown("blyan_network_bytes_total", protocol=expert, direction="out") > said("bytes_sent")
    _moved(scrapers["alice"].seen)
    rows = [watched.scrape(name).sum("blyan_worker_rows_total") for name in ("bob", "carol")]
    assert sum(rows) >= ANSWERS * NEW * len(layers), "of each token each layer's experts"
    for name in ("bob", "carol"):
        numbers = watched.scrape(name)
        assert numbers.sum("blyan_worker_batch_rows_sum") == numbers.sum("blyan_worker_rows_total")
        assert numbers.sum("blyan_held_experts") == len(
            watched.nodes[name]("expert", "stats")["experts"]
        )


def _moved(seen: list[Numbers]) -> None:
    """Counters only grow, and did so while the answers were made."""
    tokens = [numbers.sum("blyan_tokens_total", kind="new") for numbers in seen]
    assert len(set(tokens)) > 3, "it was seen in between"
    assert max(numbers.sum("blyan_requests_in_flight") for numbers in seen) >= 1
    for earlier, later in pairwise(seen):
        for (name, labels), value in earlier.items():
            if name.endswith(("_total", "_bucket", "_count")):
                assert later[name, labels] >= value, name


def test_an_answer_that_runs_is_seen_and_one_that_is_ended_is_told_apart(watched: Watched) -> None:
    alice = watched.nodes["alice"]
    before = watched.scrape("alice")
    params = {"model": "tiny", "prompt_ids": PROMPT, "max_tokens": 5_000, "ignore_eos": True}
    with alice.stream("generate.run", params) as lines:
        assert next(line for line in lines if line.get("method") == "generate.token")
        during = watched.scrape("alice")
    alice.until("the end of the answer of a client that left", lambda: not _running(alice))
    after = watched.scrape("alice")
    assert during.sum("blyan_requests_in_flight") == 1
    assert during.sum("blyan_rpc_in_flight") == 1
    assert during.sum("blyan_memory_used_bytes", use="caches") > 0
    new = "blyan_tokens_total"
    assert before.sum(new, kind="new") < during.sum(new, kind="new") <= after.sum(new, kind="new")
    outcome = {"outcome": "cancelled"}
    assert after.sum("blyan_requests_total", **outcome) == 1 + before.sum(
        "blyan_requests_total", **outcome
    )


def _running(node: Node) -> bool:
    samples = node.call("metrics.read")["samples"]
    return any(s["value"] for s in samples if s["name"] == "blyan_requests_in_flight")


def test_errors_are_counted_by_their_cause(watched: Watched) -> None:
    alice = watched.nodes["alice"]
    before = watched.scrape("alice")
    alice("model", "show", "nothing", code=1)
    after = watched.scrape("alice")
    for name, labels, more in (
        ("blyan_errors_total", {"code": ErrorCode.NOT_FOUND.name}, 1),
        ("blyan_errors_total", {}, 1),
        ("blyan_rpc_requests_total", {"method": "model.show"}, 1),
    ):
        assert after.sum(name, **labels) == before.sum(name, **labels) + more


def test_the_rpc_has_the_same_numbers_as_the_port(watched: Watched) -> None:
    port = watched.scrape("bob")
    rpc = watched.nodes["bob"].call("metrics.read")
    series = {(s["name"], frozenset(s["labels"].items())): s["value"] for s in rpc["samples"]}
    assert set(port) <= set(series)  # this very call may have a series of its own
    same = ("blyan_held_expert_bytes", "blyan_blocks", "blyan_worker_rows_total", "blyan_info")
    for key, value in port.items():
        if key[0] in same:
            assert series[key] == value


def test_scrapers_that_stall_or_talk_nonsense_hold_up_no_answer(watched: Watched) -> None:
    host, port = watched.urls["alice"].removeprefix("http://").split("/")[0].split(":")
    with ExitStack() as stack:
        for number in range(200):
            link = stack.enter_context(socket.create_connection((host, int(port))))
            with suppress(OSError):  # it may be closed already, as the one that waits longest
                link.sendall(
                    (b"", b"GET /met", b"\x16\x03\x01" * 3, b"GET / HTTP/1.1\r\n\r\n")[number % 4]
                )
        answer = _generate(watched.nodes["alice"])
        assert answer["stats"]["new_tokens"] == NEW
        assert watched.scrape("alice").sum("blyan_peers") == 2


def test_an_address_that_others_reach_is_refused_in_words(tmp_path: Path) -> None:
    refused = blyan("start", "--home", tmp_path / "x", "--metrics", "0.0.0.0:9464", code=3)
    assert "public:0.0.0.0:9464" in refused["error"]["message"]
