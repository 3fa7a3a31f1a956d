"""Reads the services' own counters, when somebody asks: nothing is counted twice or kept beside.

A reading is the value of each series of each metric of the table: by the values of its labels, in
the order in which the table names them.
"""

from collections.abc import Mapping

from blyan_node.logs import COUNTED
from blyan_node.parts import App
from blyan_node.services.held import Reason
from blyan_node.services.memory import resident
from blyan_node.services.spread import Spread

Series = Mapping[tuple[str, ...], float | Spread]
ONE = ()


def readings(app: App) -> dict[str, Series]:
    """Every metric of the table, by name without `blyan_`."""
    return {
        **_node(app),
        **_chain(app),
        **_kept(app),
        **_worker(app),
        **_answers(app),
        **_traffic(app),
        **_operator(app),
    }


def _node(app: App) -> dict[str, Series]:
    counted = resident()
    memory = {} if counted is None else vars(counted)
    return {
        "info": {(app.version, app.profile, app.config.role): 1},
        "start_time_seconds": {ONE: app.began_at},
        "process_memory_bytes": {(kind,): value for kind, value in memory.items()},
    }


def _chain(app: App) -> dict[str, Series]:
    stats, syncing = app.store.stats(), app.sync.syncing()
    have, want = (syncing.have, syncing.want) if syncing else (stats.accepted, stats.accepted)
    roles = [peer.role for peer in app.network.peers.values()]
    return {
        "peers": {(role,): roles.count(role) for role in ("main", "gpu")},
        "blocks": {("accepted",): stats.accepted, ("staged",): stats.staged},
        "models": {ONE: len(app.chain.models())},
        "sync_have_blocks": {ONE: have},
        "sync_want_blocks": {ONE: want},
    }


def _kept(app: App) -> dict[str, Series]:
    stats, memory, quota = app.store.stats(), app.holding.memory, app.store.quota_bytes
    held = {
        reason.value: [one.bytes for one in app.holding.held() if one.reason is reason]
        for reason in Reason
    }
    return {
        "held_experts": {(reason,): len(sizes) for reason, sizes in held.items()},
        "held_expert_bytes": {(reason,): sum(sizes) for reason, sizes in held.items()},
        "store_bytes": {ONE: stats.chunk_bytes},
        "store_pack_bytes": {ONE: stats.pack_bytes},
        "store_quota_bytes": {} if quota is None else {ONE: quota},
        "memory_budget_bytes": {ONE: memory.budget},
        "memory_used_bytes": {
            ("experts",): memory.experts,
            ("trunks",): memory.trunks,
            ("caches",): memory.caches,
        },
    }


def _worker(app: App) -> dict[str, Series]:
    serving = app.serving
    return {
        "worker_queue_requests": {ONE: serving.queue_length},
        "worker_requests_total": {ONE: serving.requests},
        "worker_busy_total": {ONE: serving.busy},
        "worker_rows_total": {ONE: serving.rows},
        "worker_compute_seconds_total": {ONE: serving.compute_s},
        "worker_batch_requests": {ONE: serving.batch_requests},
        "worker_batch_rows": {ONE: serving.batch_rows},
    }


def _answers(app: App) -> dict[str, Series]:
    work = app.generation.work
    return {
        "requests_in_flight": {ONE: work.running},
        "requests_total": {(outcome,): count for outcome, count in sorted(work.outcomes.items())},
        "tokens_total": {
            ("prompt",): work.total("prompt_tokens"),
            ("new",): work.total("new_tokens"),
        },
        "first_token_seconds": {ONE: work.first_token},
        "token_gap_seconds": {ONE: work.token_gap},
        "layer_seconds": {(layer,): spread for layer, spread in app.layers.latency.items()},
        "expert_calls_total": {ONE: work.total("remote_calls")},
        "expert_retries_total": {ONE: work.total("retries")},
        "expert_bytes_total": {
            ("in",): work.total("bytes_received"),
            ("out",): work.total("bytes_sent"),
        },
    }


def _traffic(app: App) -> dict[str, Series]:
    passed, counters = app.network.ledger.protocols, app.network.counters
    return {
        "network_bytes_total": {
            (name, direction): count
            for name, t in passed.items()
            for direction, count in (("in", t.bytes_in), ("out", t.bytes_out))
        },
        "network_requests_total": {
            (name, direction): count
            for name, t in passed.items()
            for direction, count in (("in", t.requests_in), ("out", t.requests_out))
        },
        "network_failures_total": {
            (name, cause): count
            for name, t in passed.items()
            for cause, count in sorted(t.failures.items())
        },
        "gossip_messages_total": {
            ("in",): counters.gossip_in,
            ("out",): counters.gossip_out,
            ("dropped",): counters.gossip_dropped,
            ("refused",): counters.gossip_refused,
        },
        "penalties_total": {ONE: counters.penalties},
        "fetch_bytes_total": {
            ("in",): app.fetch.received_bytes,
            ("out",): app.fetch.served_bytes,
        },
    }


def _operator(app: App) -> dict[str, Series]:
    tally = app.tally
    return {
        "rpc_connections": {ONE: tally.connections},
        "rpc_in_flight": {ONE: tally.in_flight},
        "rpc_requests_total": {(method,): n for method, n in sorted(tally.requests.items())},
        "errors_total": {(code,): n for code, n in sorted(tally.errors.items())},
        "events_dropped_total": {ONE: tally.events_dropped},
        "log_lines_total": {(level,): n for level, n in sorted(COUNTED.lines.items())},
        "log_suppressed_total": {ONE: COUNTED.suppressed},
    }
