"""`model.*`."""

from collections import Counter
from functools import partial
from pathlib import Path

import trio

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from protocols.dag.header import Block
from protocols.errors import ErrorCode, Refused
from protocols.ids import (
    BlockId,
    PeerId,
    Subject,
    cid_text,
    model_root,
    parse_cid,
    parse_root,
    parse_subject,
    peer_id_of,
    root_text,
)
from protocols.rpc import model
from storage.pins import Pin


async def list_models(app: App, request: model.ListRequest, context: Context) -> model.ListResult:
    """The models that the node knows, by name."""
    found = [_info(app, block) for block in app.chain.models().values()]
    return model.ListResult(models=sorted(found, key=lambda info: (info.name, info.model)))


async def show(app: App, request: model.ShowRequest, context: Context) -> model.ShowResult:
    """One model and the head of each of its parts."""
    block = app.chain.find_model(request.model)
    info = _info(app, block)
    return model.ShowResult(
        name=info.name,
        model=info.model,
        author=info.author,
        family=info.family,
        root=info.root,
        experts=info.experts,
        held=info.held,
        bytes=info.bytes,
        subjects={
            str(subject): _subject(app, subject, id)
            for subject, id in sorted(app.chain.heads(block.id).items(), key=_by_place)
        },
    )


def _info(app: App, block: Block) -> model.ModelInfo:
    heads = app.chain.heads(block.id)
    experts = [id for subject, id in heads.items() if parse_subject(subject).expert is not None]
    sizes = (app.store.block(id) for id in heads.values())
    return model.ModelInfo(
        name=str(block.header.meta["name"]),
        model=cid_text(block.id),
        author=peer_id_of(block.header.author),
        family=str(block.header.meta["family"]),
        root=root_text(model_root(block.id, heads)),
        experts=len(experts),
        held=sum(bool(app.adverts.holders_with_self(id)) for id in experts),
        bytes=block.header.size + sum(part.header.size for part in sizes if part is not None),
    )


def _subject(app: App, subject: Subject, id: BlockId) -> model.SubjectInfo:
    _, manifest = app.store.body(id)
    return model.SubjectInfo(
        block=cid_text(id),
        tensors=[tensor.name for tensor in manifest.tensors],
        bytes=manifest.size,
        computed=parse_subject(subject).kind != "mtp",
    )


def _by_place(item: tuple[Subject, BlockId]) -> tuple[int, int, int, str]:
    """In the order in which a token meets the parts of a model."""
    name = parse_subject(item[0])
    if name.layer is None:
        return (0 if name.kind == "embed" else 2, 0, 0, name.kind)
    return 1, name.layer, -1 if name.expert is None else name.expert, name.kind


async def fetch(app: App, request: model.FetchRequest, context: Context) -> model.FetchResult:
    """Stores every block of a model here, to stay."""
    id = app.chain.find_model(request.model).id
    root = None if request.root is None else parse_root(request.root)
    blocks = [id, *app.export.heads(id, root).values()]
    missing = await trio.to_thread.run_sync(_not_stored, app, blocks)
    by_peer: Counter[PeerId] = Counter()
    came = await app.fetch.fetch(missing, context.progress, by_peer)
    pin = partial(app.store.pin, *blocks, reason=Pin.FETCHED)
    await trio.to_thread.run_sync(pin)
    shares = {str(peer): count for peer, count in by_peer.items()}
    return model.FetchResult(blocks=len(missing), bytes=came, peers=shares)


def _not_stored(app: App, blocks: list[BlockId]) -> list[BlockId]:
    return [id for id in blocks if not app.store.is_stored(id)]


async def verify(app: App, request: model.VerifyRequest, context: Context) -> model.VerifyResult:
    """Reads and checks every stored byte of a model."""
    block = app.chain.find_model(request.model)
    found = await app.verify.verify(block.id, context.progress)
    return model.VerifyResult(
        ok=found.ok,
        blocks=found.blocks,
        bytes=found.bytes,
        bad=[
            model.BadBlock(subject=bad.subject, block=cid_text(bad.block), why=bad.why)
            for bad in found.bad
        ],
    )


async def wait(app: App, request: model.WaitRequest, context: Context) -> model.WaitResult:
    """Waits for holders."""
    block = app.chain.find_model(request.model)
    replicas = await app.placement.wait_replicas(
        block.id, request.replicas, partial(context.progress, unit="replicas")
    )
    return model.WaitResult(replicas=replicas)


async def export(app: App, request: model.ExportRequest, context: Context) -> model.ExportResult:
    """Writes a Hugging Face directory."""
    block = app.chain.find_model(request.model)
    root = None if request.root is None else parse_root(request.root)
    done = await app.export.export(block.id, Path(request.out), root, context.progress)
    return model.ExportResult(path=str(done.path), files=done.files, bytes=done.bytes)


async def update(app: App, request: model.UpdateRequest, context: Context) -> model.UpdateResult:
    """Publishes a new version of one part."""
    block = app.chain.find_model(request.model)
    subject = Subject(request.subject)
    if subject not in app.chain.heads(block.id):
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"{request.model} has no {request.subject}",
            "no part of the model has this name",
            "`blyan-node model show` lists its parts",
            {"model": cid_text(block.id), "subject": request.subject},
        )
    base = None if request.base is None else BlockId(parse_cid(request.base))
    done = await app.update.update(block.id, subject, Path(request.weights), base)
    return model.UpdateResult(
        subject=str(done.subject),
        block=cid_text(done.block),
        base=cid_text(done.base),
        root=root_text(done.root),
    )
