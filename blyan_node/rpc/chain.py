"""`chain.*` and `block.*`."""

from functools import partial
from typing import Any

import trio

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from blyan_node.services.audit import audit
from protocols.dag.header import Block
from protocols.dag.heads import Fork
from protocols.dag.order import graphviz
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId, cid_text, parse_cid, peer_id_of, root_text
from protocols.rpc import chain


async def status(
    app: App, request: chain.ChainStatusRequest, context: Context
) -> chain.ChainStatusResult:
    """How many blocks there are, and what they wait for."""
    stats = app.store.stats()
    return chain.ChainStatusResult(
        network=cid_text(app.chain.network),
        blocks=stats.accepted,
        staged=stats.staged,
        parked=app.chain.parked,
        models=len(app.chain.models()),
    )


async def heads(app: App, request: chain.HeadsRequest, context: Context) -> chain.HeadsResult:
    """The current block of each part, and the forks that were kept."""
    found = [_heads(app, block) for block in _models(app, request.model)]
    return chain.HeadsResult(models=found)


def _models(app: App, name: str | None) -> list[Block]:
    if name is not None:
        return [app.chain.find_model(name)]
    models = app.chain.models().values()
    return sorted(models, key=lambda block: (str(block.header.meta["name"]), block.id))


def _heads(app: App, block: Block) -> chain.ModelHeads:
    return chain.ModelHeads(
        model=cid_text(block.id),
        name=str(block.header.meta["name"]),
        root=root_text(app.chain.root(block.id)),
        heads={str(s): cid_text(id) for s, id in sorted(app.chain.heads(block.id).items())},
        forks=[_fork(fork) for fork in app.chain.forks(block.id)],
    )


def _fork(fork: Fork) -> chain.Fork:
    return chain.Fork(
        subject=None if fork.subject is None else str(fork.subject),
        base=None if fork.base is None else cid_text(fork.base),
        chosen=cid_text(fork.chosen),
        others=[cid_text(id) for id in fork.others],
    )


async def log(app: App, request: chain.LogRequest, context: Context) -> chain.LogResult:
    """A page of the order in which this node accepted blocks."""
    rows = app.store.log(request.after, request.limit)
    entries = [
        chain.LogEntry(n=n, block=chain.BlockInfo(**_header(block)))
        for n, id in rows
        if (block := app.store.block(id)) is not None
    ]
    more = bool(rows) and rows[-1][0] < app.store.stats().accepted
    return chain.LogResult(entries=entries, next=rows[-1][0] if more else None)


async def verify(
    app: App, request: chain.ChainVerifyRequest, context: Context
) -> chain.ChainVerifyResult:
    """Checks every header."""
    told = partial(context.progress, unit="blocks")
    found = await trio.to_thread.run_sync(partial(audit, app.chain, told))
    return chain.ChainVerifyResult(
        ok=not found.bad,
        blocks=found.blocks,
        bad=[chain.BadHeader(block=cid_text(id), why=why) for id, why in found.bad],
    )


async def graph(app: App, request: chain.GraphRequest, context: Context) -> chain.GraphResult:
    """The DAG as a Graphviz document."""
    models = [block.id for block in _models(app, request.model)]

    def draw() -> str:
        every = (app.store.block(id) for _, id in app.store.log(0, app.store.stats().accepted))
        blocks = [b for b in every if b is not None and (b.header.model or b.id) in models]
        return graphviz(blocks, {model: app.chain.heads(model) for model in models})

    return chain.GraphResult(dot=await trio.to_thread.run_sync(draw))


async def show_block(app: App, request: chain.BlockRequest, context: Context) -> chain.BlockResult:
    """One block: its header, its tensors, whether it is stored."""
    id = BlockId(parse_cid(request.id))
    block = app.store.block(id)
    if block is None:
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"no block {request.id}",
            "this node does not know it",
            "a node that has just started may still be catching up",
            {"block": request.id},
        )
    body = block.header.body
    manifest = None if body is None else app.store.manifest(body)
    return chain.BlockResult(
        **_header(block),
        network=cid_text(block.header.net),
        body=None if body is None else cid_text(body),
        accepted=app.store.is_accepted(id),
        stored=app.store.is_stored(id),
        tensors=None
        if manifest is None
        else [
            chain.TensorInfo(
                name=tensor.name,
                dtype=str(tensor.dtype),
                shape=list(tensor.shape),
                bytes=tensor.size,
            )
            for tensor in manifest.tensors
        ],
    )


def _header(block: Block) -> dict[str, Any]:
    header = block.header
    return {
        "id": cid_text(block.id),
        "chain": str(header.chain),
        "kind": str(header.kind),
        "author": peer_id_of(header.author),
        "seq": header.seq,
        "time": header.time,
        "depends_on": [cid_text(id) for id in header.depends_on],
        "model": None if header.model is None else cid_text(header.model),
        "subject": None if header.subject is None else str(header.subject),
        "base": None if header.base is None else cid_text(header.base),
        "size": header.size,
        "meta": dict(header.meta),
    }
