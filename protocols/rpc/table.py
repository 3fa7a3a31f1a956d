"""Every method of the RPC: the single source of server, client, help, OpenRPC and reference page.

A method is a typed request, a typed result, the refusals that it may answer with, and the
notifications that it sends while it runs. What every method may answer (a parse error, wrong
parameters, BUSY, CANCELLED, INTERNAL) is not repeated at each.
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from protocols.errors import ErrorCode
from protocols.rpc import (
    calls,
    chain,
    config,
    doctor,
    events,
    expert,
    generate,
    metrics,
    model,
    node,
)

E = ErrorCode


@dataclass(frozen=True)
class Stream:
    """A notification that a method sends while it runs; its params carry the request's `id`."""

    name: str
    params: type[msgspec.Struct]


PROGRESS = Stream("progress", calls.Progress)
TOKENS = Stream("generate.token", generate.Token)
EVENTS = Stream("event", events.Event)


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    summary: str
    request: type[msgspec.Struct]
    result: Any
    errors: tuple[ErrorCode, ...] = ()
    streams: tuple[Stream, ...] = ()


_MODEL = (E.NOT_FOUND, E.AMBIGUOUS)
_HUB = (E.NOT_FOUND, E.TIMEOUT, E.HUB_FAILED)
_PUBLISH = (E.BAD_MODEL, E.BAD_INPUT, E.CONFLICT, E.NOT_ALLOWED, E.DISK_FULL, *_HUB)
_RUN = (*_MODEL, E.BAD_INPUT, E.BLOCK_MISSING, E.EXPERT_UNAVAILABLE, E.CORRUPT, E.DISK_FULL)

_ROWS = (
    Method(
        "node.status",
        "What the node is, does and waits for",
        node.StatusRequest,
        node.StatusResult,
    ),
    Method("node.id", "The node's peer id and addresses", node.IdRequest, node.IdResult),
    Method("node.peers", "The nodes it is connected to", node.PeersRequest, node.PeersResult),
    Method("node.stop", "Drain and stop the node", node.StopRequest, node.StopResult),
    Method(
        "node.config",
        "The settings in use, and where each came from",
        config.ConfigRequest,
        config.ConfigResult,
    ),
    Method(
        "node.doctor",
        "Say why the node cannot be reached or cannot keep up, and what to do",
        doctor.DoctorRequest,
        doctor.DoctorResult,
    ),
    Method(
        "network.show",
        "The genesis of the network that the node is in",
        node.NetworkRequest,
        node.NetworkResult,
    ),
    Method(
        "model.publish",
        "Turn a Hugging Face directory into blocks and announce them when whole",
        model.PublishRequest,
        model.PublishResult,
        _PUBLISH,
        (PROGRESS,),
    ),
    Method(
        "model.dry_run",
        "Say what a publish would store and reuse and how long it would take, and store nothing",
        model.DryRunRequest,
        model.DryRunResult,
        _PUBLISH,
        (PROGRESS,),
    ),
    Method("model.list", "The models that the node knows", model.ListRequest, model.ListResult),
    Method(
        "model.show",
        "One model and the head of each of its parts",
        model.ShowRequest,
        model.ShowResult,
        _MODEL,
    ),
    Method(
        "model.fetch",
        "Store every block of a model here",
        model.FetchRequest,
        model.FetchResult,
        (*_MODEL, E.BAD_INPUT, E.BLOCK_MISSING, E.DISK_FULL),
        (PROGRESS,),
    ),
    Method(
        "model.verify",
        "Read and check every stored byte of a model",
        model.VerifyRequest,
        model.VerifyResult,
        _MODEL,
        (PROGRESS,),
    ),
    Method(
        "model.wait",
        "Wait until every expert has enough live holders",
        model.WaitRequest,
        model.WaitResult,
        _MODEL,
        (PROGRESS,),
    ),
    Method(
        "model.export",
        "Write a model as a Hugging Face directory, byte-equal to what was published",
        model.ExportRequest,
        model.ExportResult,
        (*_MODEL, E.BAD_INPUT, E.CONFLICT, E.BLOCK_MISSING, E.CORRUPT, E.DISK_FULL),
        (PROGRESS,),
    ),
    Method(
        "model.update",
        "Publish a new version of one part, in place of its current head",
        model.UpdateRequest,
        model.UpdateResult,
        (*_MODEL, E.STALE_BASE, E.BAD_INPUT, E.BAD_MODEL, E.NOT_ALLOWED, E.DISK_FULL),
    ),
    Method(
        "expert.list",
        "Who holds which expert, at which block",
        expert.ExpertListRequest,
        expert.ExpertsResult,
        _MODEL,
    ),
    Method(
        "expert.where",
        "Who holds one expert",
        expert.WhereRequest,
        expert.ExpertsResult,
        (*_MODEL, E.BAD_INPUT),
    ),
    Method(
        "expert.hold",
        "Load experts and compute with them for others",
        expert.HoldRequest,
        expert.HeldResult,
        (*_MODEL, E.BAD_INPUT, E.BLOCK_MISSING, E.NOT_ALLOWED, E.DISK_FULL),
        (PROGRESS,),
    ),
    Method(
        "expert.drop",
        "Hold experts no longer",
        expert.DropRequest,
        expert.HeldResult,
        (*_MODEL, E.BAD_INPUT, E.LAST_COPY),
    ),
    Method(
        "expert.stats",
        "What the held experts have done",
        expert.ExpertStatsRequest,
        expert.ExpertStatsResult,
    ),
    Method(
        "generate.run",
        "Answer a prompt, token by token",
        generate.GenerateRequest,
        generate.GenerateResult,
        _RUN,
        (TOKENS, PROGRESS),
    ),
    Method(
        "forward.run",
        "One pass over a prompt: logits and the chosen experts, written to a file",
        generate.ForwardRequest,
        generate.ForwardResult,
        _RUN,
        (PROGRESS,),
    ),
    Method(
        "chain.status",
        "How many blocks there are, and what they wait for",
        chain.ChainStatusRequest,
        chain.ChainStatusResult,
    ),
    Method(
        "chain.heads",
        "The current block of each part, and the forks that were kept",
        chain.HeadsRequest,
        chain.HeadsResult,
        _MODEL,
    ),
    Method(
        "chain.log",
        "Blocks in the order in which this node accepted them",
        chain.LogRequest,
        chain.LogResult,
    ),
    Method(
        "chain.verify",
        "Check every header: form, signature, parents, heads",
        chain.ChainVerifyRequest,
        chain.ChainVerifyResult,
        (),
        (PROGRESS,),
    ),
    Method(
        "chain.graph",
        "The DAG as a Graphviz document",
        chain.GraphRequest,
        chain.GraphResult,
        _MODEL,
    ),
    Method(
        "block.show",
        "One block: its header, its tensors, whether it is stored",
        chain.BlockRequest,
        chain.BlockResult,
        (E.NOT_FOUND, E.BAD_INPUT),
    ),
    Method(
        "events.subscribe",
        "Send events until the request is cancelled",
        events.SubscribeRequest,
        events.SubscribeResult,
        (),
        (EVENTS,),
    ),
    Method(
        "metrics.read",
        "What the node counts and measures, as Prometheus sees it",
        metrics.MetricsRequest,
        metrics.MetricsResult,
    ),
    Method(
        "rpc.discover",
        "The OpenRPC document of all methods",
        calls.DiscoverRequest,
        calls.OpenRpc,
    ),
    Method(
        "rpc.cancel",
        "End a request of this connection early",
        calls.CancelRequest,
        calls.CancelResult,
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
assert len(METHODS) == len(_ROWS), "a method is in the table twice"
