"""`expert.*`."""

from collections.abc import Sequence
from functools import partial

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from blyan_node.rpc.node import held
from blyan_node.services.held import Reason
from blyan_node.services.memory import resident
from protocols.dag.header import Block
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, PeerId, Subject, cid_text, expert_subject, parse_subject
from protocols.rpc import expert


async def list_experts(
    app: App, request: expert.ExpertListRequest, context: Context
) -> expert.ExpertsResult:
    """Who holds which expert."""
    found = [info for block in _models(app, request.model) for info in _experts(app, block)]
    return expert.ExpertsResult(experts=found)


async def where(app: App, request: expert.WhereRequest, context: Context) -> expert.ExpertsResult:
    """Who holds one expert."""
    ((subject, block),) = find(app, [request.subject], request.model).items()
    return expert.ExpertsResult(experts=[_info(app, subject, block)])


async def hold(app: App, request: expert.HoldRequest, context: Context) -> expert.HeldResult:
    """Loads experts and computes with them for others."""
    blocks = find(app, request.subjects, request.model)
    await app.placement.hold(list(blocks.values()), partial(context.progress, unit="experts"))
    return _held(app, blocks)


async def drop(app: App, request: expert.DropRequest, context: Context) -> expert.HeldResult:
    """Holds experts no longer."""
    blocks = find(app, request.subjects, request.model)
    await app.placement.drop(list(blocks.values()), force=request.force)
    return _held(app, blocks)


async def stats(
    app: App, request: expert.ExpertStatsRequest, context: Context
) -> expert.ExpertStatsResult:
    """What the held experts have done."""
    kept = [h for h in app.holding.held() if h.reason is not Reason.PASSING]
    return expert.ExpertStatsResult(
        queue=app.serving.queue_length,
        requests=app.serving.requests,
        busy=app.serving.busy,
        experts=[
            expert.ExpertStats(
                subject=str(expert_subject(h.what.layer, h.what.expert)),
                block=cid_text(h.what.block),
                storage=h.expert.storage,
                bytes=h.bytes,
                calls=h.calls,
                rows=h.rows,
                busy_s=h.busy_s,
            )
            for h in sorted(kept, key=lambda h: h.what)
        ],
        memory=_memory(app),
    )


def _memory(app: App) -> expert.MemoryStats:
    memory, counted = app.holding.memory, resident()
    return expert.MemoryStats(
        budget=memory.budget,
        experts=memory.experts,
        trunks=memory.trunks,
        caches=memory.caches,
        free=memory.free,
        copied=memory.copied,
        packs=app.store.packs.bytes,
        anonymous=None if counted is None else counted.anonymous,
        file=None if counted is None else counted.file,
    )


def find(app: App, subjects: Sequence[str], model: str | None) -> dict[Subject, BlockId]:
    """The blocks of experts by their names; raises `Refused`, `RemoteProtocolError`."""
    for subject in subjects:
        if parse_subject(subject).expert is None:
            raise Refused(
                ErrorCode.BAD_INPUT,
                f"{subject} is no expert",
                "only experts are held",
                "`blyan-node expert list` shows them",
                {"subject": subject},
            )
    found: dict[Subject, BlockId] = {}
    for name in map(Subject, subjects):
        having = [b for b in _models(app, model) if name in app.chain.heads(b.id)]
        if not having:
            raise Refused(
                ErrorCode.NOT_FOUND,
                f"no expert {name}",
                f"{model or 'no model that this node knows'} has no such part",
                "`blyan-node expert list` shows the experts",
                {"subject": name},
            )
        if len(having) > 1:
            names = sorted(str(block.header.meta["name"]) for block in having)
            raise Refused(
                ErrorCode.AMBIGUOUS,
                f"{len(having)} models have a {name}",
                f"they are {', '.join(names)}"[:300],
                "say which with --model",
                {"subject": name, "choices": [cid_text(block.id) for block in having]},
            )
        found[name] = app.chain.heads(having[0].id)[name]
    return found


def _models(app: App, name: str | None) -> list[Block]:
    if name is not None:
        return [app.chain.find_model(name)]
    models = app.chain.models().values()
    return sorted(models, key=lambda block: (str(block.header.meta["name"]), block.id))


def _experts(app: App, model: Block) -> list[expert.ExpertInfo]:
    found = []
    for subject, block in app.chain.heads(model.id).items():
        name = parse_subject(subject)
        if name.layer is not None and name.expert is not None:
            found.append((name.layer, name.expert, _info(app, subject, block)))
    return [info for _, _, info in sorted(found, key=lambda row: row[:2])]


def _info(app: App, subject: Subject, block: BlockId) -> expert.ExpertInfo:
    holders = [_holder(app, peer) for peer in app.adverts.holders_with_self(block)]
    return expert.ExpertInfo(subject=str(subject), block=cid_text(block), holders=holders)


def _holder(app: App, peer: PeerId) -> expert.Holder:
    if peer == app.identity.peer_id:
        queue = app.serving.queue_length
        return expert.Holder(peer_id=peer, rtt_ms=0.0, queue=queue, profile=app.profile)
    known = app.network.peers.get(peer)
    rtt_ms = None if known is None else known.rtt_ms
    return expert.Holder(
        peer_id=peer,
        rtt_ms=rtt_ms,
        queue=app.adverts.queue_of(peer),
        profile=app.adverts.profile_of(peer),
    )


def _held(app: App, blocks: dict[Subject, BlockId]) -> expert.HeldResult:
    now = held(app)
    return expert.HeldResult(
        subjects=[str(subject) for subject in blocks], experts=now.experts, bytes=now.bytes
    )
