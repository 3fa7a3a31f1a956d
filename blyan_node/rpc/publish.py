"""`model.publish` and `model.dry_run`: of a directory, or of a model on the hub."""

from functools import partial
from pathlib import Path

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from blyan_node.services.estimate import estimate
from blyan_node.services.publish import Inspected, Published
from protocols.ids import cid_text, root_text
from protocols.rpc import model
from protocols.rpc.fields import HUB


async def publish(app: App, request: model.PublishRequest, context: Context) -> model.PublishResult:
    """A directory becomes blocks; with `wait_replicas` the answer waits for their holders."""
    source = None
    if request.path.startswith(HUB):
        inspect = partial(_certainly_stored, app, request.name)
        async with app.hub.downloaded(request.path, inspect, context.progress) as found:
            source = found.source
            done = await app.publish.publish(
                found.path, request.name, context.progress, found.origin
            )
    else:
        done = await app.publish.publish(Path(request.path), request.name, context.progress)
    if request.wait_replicas is not None:
        await app.placement.wait_replicas(
            done.model, request.wait_replicas, partial(context.progress, unit="replicas")
        )
    return _published(done, source)


async def dry_run(app: App, request: model.DryRunRequest, context: Context) -> model.DryRunResult:
    """What a publish would do; the store stays as it is."""
    if not request.path.startswith(HUB):
        return await _rehearsed(app, Path(request.path), request.name, context)
    inspect = partial(_certainly_stored, app, request.name)
    async with app.hub.outlined(request.path, inspect) as found:
        if found.missing_bytes == 0:
            return await _rehearsed(app, found.path, request.name, context, found.source)
        inspected = await app.publish.inspect(found.path, request.name)
        return _unread(inspected, found.source, found.missing_bytes)


async def _certainly_stored(app: App, name: str, path: Path) -> int:
    """The bytes that a publish will store, as far as that shows without weights."""
    found = await app.publish.inspect(path, name)
    return found.bytes if found.model is None else 0


async def _rehearsed(
    app: App, path: Path, name: str, context: Context, source: str | None = None
) -> model.DryRunResult:
    found = await app.publish.rehearse(path, name, context.progress)
    pace = await estimate(found, app.config.home)
    return model.DryRunResult(
        model=None if found.model is None else cid_text(found.model),
        name=found.name,
        experts=found.experts,
        blocks=found.blocks,
        bytes=found.bytes,
        reused_bytes=found.reused_bytes,
        new_bytes=found.new_bytes,
        room_bytes=found.room_bytes,
        kept_bytes=found.kept_bytes,
        seconds=pace.seconds,
        read_bytes_per_s=pace.read_bytes_per_s,
        write_bytes_per_s=pace.write_bytes_per_s,
        source=source,
    )


def _unread(found: Inspected, source: str, missing_bytes: int) -> model.DryRunResult:
    """Of weights that are on the hub: what only they can tell is None."""
    return model.DryRunResult(
        model=None if found.model is None else cid_text(found.model),
        name=found.name,
        experts=found.experts,
        blocks=found.blocks if found.model is None else None,
        bytes=found.bytes,
        reused_bytes=None,
        new_bytes=None,
        room_bytes=found.room_bytes,
        kept_bytes=found.kept_bytes,
        seconds=None,
        read_bytes_per_s=None,
        write_bytes_per_s=None,
        download_bytes=missing_bytes,
        source=source,
    )


def _published(done: Published, source: str | None) -> model.PublishResult:
    return model.PublishResult(
        model=cid_text(done.model),
        name=done.name,
        root=root_text(done.root),
        blocks=done.blocks,
        experts=done.experts,
        bytes=done.bytes,
        reused_bytes=done.reused_bytes,
        source=source,
    )
