"""What is known of the node: the newest answers, the ones before them, and what follows.

Rates come from two answers and the time between them; nothing here asks, draws or reads a clock.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EVENTS_KEPT = 100
RATES_KEPT = 60
MODELS_MAX = 8  # whose experts are looked at
POLLED = ("node.status", "node.peers", "model.list", "expert.stats", "metrics.read")


@dataclass
class Holders:
    """Of one model: the live holders of its rarest expert, and how many experts each peer holds."""

    replicas: int = 0
    by_peer: dict[str, int] = field(default_factory=dict)


@dataclass
class Seen:
    """Everything that a frame shows. Times are in s of the asker's clock."""

    answers: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    holders: dict[str, Holders] = field(default_factory=dict)  # by model
    events: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=EVENTS_KEPT))
    tokens_per_s: deque[float] = field(default_factory=lambda: deque(maxlen=RATES_KEPT))
    at: float = 0.0
    span_s: float = 0.0
    polls: int = 0
    silent_s: float = 0.0  # for which a poll has not been answered

    def polled(self, answers: Mapping[str, Any], now: float) -> None:
        """Takes in the answers of one poll."""
        self.before, self.answers = self.answers, dict(answers)
        self.span_s, self.at = now - self.at, now
        self.polls += 1
        if self.polls > 1:
            self.tokens_per_s.append(self.rate("blyan_tokens_total", kind="new"))

    def held(self, model: str, experts: list[dict[str, Any]]) -> None:
        """Takes in who holds the experts of a model."""
        found = self.holders[model] = Holders()
        found.replicas = min((len(expert["holders"]) for expert in experts), default=0)
        for expert in experts:
            for holder in expert["holders"]:
                peer = holder["peer_id"]
                found.by_peer[peer] = found.by_peer.get(peer, 0) + 1

    def held_by(self, peer: str) -> int:
        """How many experts `peer` holds, of all models."""
        return sum(model.by_peer.get(peer, 0) for model in self.holders.values())

    @property
    def models(self) -> list[dict[str, Any]]:
        """The models whose experts are looked at."""
        listed: list[dict[str, Any]] = self.answers["model.list"]["models"]
        return listed[:MODELS_MAX]

    def value(self, name: str, **labels: str) -> float:
        """The sum of a metric's series that have `labels`."""
        return _sum(self.answers, name, labels)

    def rate(self, name: str, **labels: str) -> float:
        """How much a metric grows in a second; 0 before there are two polls."""
        if self.polls < 2 or self.span_s <= 0:
            return 0.0
        grown = _sum(self.answers, name, labels) - _sum(self.before, name, labels)
        return max(0.0, grown) / self.span_s

    def label_values(self, name: str, label: str) -> list[str]:
        """Every value that `label` has in a metric."""
        samples = self.answers["metrics.read"]["samples"]
        return list(dict.fromkeys(s["labels"][label] for s in samples if s["name"] == name))

    def peer_rate(self, peer: str, direction: str) -> float:
        """Bytes in a second from ("in") or to ("out") a peer."""
        now, then = (
            {p["peer_id"]: p for p in answers.get("node.peers", {}).get("peers", ())}
            for answers in (self.answers, self.before)
        )
        if peer not in then or self.span_s <= 0:
            return 0.0
        key = f"bytes_{direction}"
        return float(max(0, now[peer][key] - then[peer][key])) / self.span_s


def _sum(answers: Mapping[str, Any], name: str, labels: Mapping[str, str]) -> float:
    samples = answers.get("metrics.read", {}).get("samples", ())
    return float(
        sum(
            sample["value"]
            for sample in samples
            if sample["name"] == name and labels.items() <= sample["labels"].items()
        )
    )
