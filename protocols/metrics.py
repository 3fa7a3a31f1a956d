"""Every number that a node shows of itself: the single source of `/metrics`, `metrics.read`,
`docs/metrics.md` and the test of the dashboard.

No label's value is chosen by a peer: each label says here from which fixed set its values come, so
nobody can make a node show more series than there are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]

LAYER_LABELS_MAX = 128
BEHIND = "more"  # the label of all layers behind the last that has its own

LABELS: Mapping[str, str] = {
    "version": "the node's own version",
    "profile": "the node's own numeric profile",
    "role": "`main` or `gpu`",
    "state": "`accepted`, or `staged` (waits for a release)",
    "reason": "`order` (the operator's), `placement` or `passing` (a request needed it)",
    "use": "`experts`, `trunks` or `caches`",
    "memory": "`anonymous` or `file`",
    "layer": f"the number of the layer, up to {LAYER_LABELS_MAX - 1}; `{BEHIND}` for all behind it",
    "protocol": "one of the protocols that this node speaks, such as `/blyan/expert/1`; "
    "`/meshsub/1.1.0` is gossip",
    "direction": "`in` or `out`, as seen from this node",
    "cause": "`gone`, `timeout`, `malformed`, or `refused`",
    "code": "the name of an error of the RPC, such as `EXPERT_UNAVAILABLE`",
    "method": "a method of the RPC",
    "outcome": "how an answer ended: `stop`, `length`, `cancelled`, `refused`, `failed` "
    "(a bug), or `forward`: one pass over a prompt",
    "kind": "`prompt` or `new`",
    "fate": "`in`, `out`, `dropped` (too many at once) or `refused` (broke a rule)",
    "level": "`debug`, `info`, `warning`, `error` or `critical`",
}

_MS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


@dataclass(frozen=True)
class Metric:
    """One row of the table. A counter's name ends in `_total`; `bounds` are a histogram's."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


def _gauge(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"blyan_{name}", "gauge", help, labels)


def _count(name: str, help: str, *labels: str) -> Metric:
    return Metric(f"blyan_{name}_total", "counter", help, labels)


def _spread(name: str, help: str, bounds: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"blyan_{name}", "histogram", help, labels, bounds)


_ROWS = (
    _gauge("info", "Always 1; the labels say what the node is", "version", "profile", "role"),
    _gauge("start_time_seconds", "When the node began to serve, in s since 1970"),
    _gauge("process_memory_bytes", "The process's memory as the system counts it", "memory"),
    # The swarm and the chain
    _gauge("peers", "Connected peers that passed hello", "role"),
    _gauge("blocks", "Blocks whose headers are here", "state"),
    _gauge("models", "Models that the node knows"),
    _gauge("sync_have_blocks", "Blocks that are here, while the node catches up"),
    _gauge("sync_want_blocks", "Blocks that peers have; as many as are here once level"),
    # What is here
    _gauge("held_experts", "Experts that are loaded", "reason"),
    _gauge("held_expert_bytes", "Bytes of the experts that are loaded", "reason"),
    _gauge("store_bytes", "Bytes of the chunks that are stored"),
    _gauge("store_pack_bytes", "Bytes of the pack files that held experts are mapped from"),
    _gauge("store_quota_bytes", "What the store may take (--disk); no sample without a bound"),
    _gauge("memory_budget_bytes", "Memory for weights and caches (--memory)"),
    _gauge("memory_used_bytes", "What of the budget is taken", "use"),
    # Work for others
    _gauge("worker_queue_requests", "Requests of others that wait for a product"),
    _count("worker_requests", "Requests of others for products of held experts"),
    _count("worker_busy", "Requests of others that were turned away because the queue was full"),
    _count("worker_rows", "Rows that were computed for others"),
    _count("worker_compute_seconds", "Time in products for others"),
    _spread("worker_batch_requests", "Requests that were computed in one turn", _COUNTS),
    _spread("worker_batch_rows", "Rows that were computed in one turn", _COUNTS),
    # Answers
    _gauge("requests_in_flight", "Answers that are being generated"),
    _count("requests", "Answers that have ended", "outcome"),
    _count("tokens", "Tokens of prompts, and tokens that were generated", "kind"),
    _spread("first_token_seconds", "From a request to its first token", _S),
    _spread("token_gap_seconds", "From a token to the next of the same answer", _MS),
    _spread("layer_seconds", "From a layer's rows to its experts' outputs, here and elsewhere",
            _MS, "layer"),
    _count("expert_calls", "Messages to holders of experts"),
    _count("expert_retries", "Messages to holders for rows that had been asked for before"),
    _count("expert_bytes", "Bytes of activations to and from holders", "direction"),
    # Traffic
    _count("network_bytes", "Bytes on the streams of a protocol", "protocol", "direction"),
    _count("network_requests", "Requests to peers (out) and of peers (in)", "protocol",
           "direction"),
    _count("network_failures", "Requests to peers that failed", "protocol", "cause"),
    _count("gossip_messages", "Gossip messages", "fate"),
    _count("penalties", "Times that a peer lost score because it broke a rule"),
    _count("fetch_bytes", "Bytes of verified chunks from peers (in) and for peers (out)",
           "direction"),
    # The operator's side
    _gauge("rpc_connections", "Clients that are connected to the RPC"),
    _gauge("rpc_in_flight", "Requests of the RPC that run"),
    _count("rpc_requests", "Requests of the RPC", "method"),
    _count("errors", "Requests of the RPC that were answered with an error", "code"),
    _count("events_dropped", "Events that subscribers did not take in time"),
    _count("log_lines", "Lines of the log", "level"),
    _count("log_suppressed", "Lines of the log that were left out, as too many were alike"),
)  # fmt: skip

METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}
assert len(METRICS) == len(_ROWS), "a metric is in the table twice"
assert {label for row in _ROWS for label in row.labels} == LABELS.keys()

_HEAD = """\
# Metrics

<!-- Made from protocols/metrics.py; a test checks that it is current. -->

What a node counts and measures, since it was started. `blyan-node start --metrics 127.0.0.1:9464`
shows it to Prometheus on `/metrics`, and `blyan-node rpc metrics.read` has the same numbers as
JSON without any port. [operations.md](operations.md) says how to scrape it and what to watch.

No label's value comes from a peer, so the number of series is bounded.
"""


def page() -> str:
    """`docs/metrics.md`."""
    parts = [_HEAD, "| metric | kind | labels | what |", "| --- | --- | --- | --- |"]
    for row in METRICS.values():
        labels = ", ".join(f"`{label}`" for label in row.labels)
        parts.append(f"| `{row.name}` | {row.kind} | {labels} | {row.help} |")
    parts += ["", "## Labels", "", "| label | values |", "| --- | --- |"]
    parts += [f"| `{name}` | {values} |" for name, values in LABELS.items()]
    parts += ["", "## Histograms", "", "| metric | upper bounds |", "| --- | --- |"]
    for row in METRICS.values():
        if row.bounds:
            parts.append(f"| `{row.name}` | {', '.join(f'{b:g}' for b in row.bounds)} |")
    return "\n".join(parts) + "\n"
