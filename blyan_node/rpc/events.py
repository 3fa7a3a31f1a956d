"""`events.subscribe`."""

import time
from collections.abc import Mapping
from typing import Any

import trio

from blyan_node.network.interface import PeerUp
from blyan_node.parts import App
from blyan_node.rpc.context import Context
from blyan_node.services.chain import ReleaseAccepted
from protocols.ids import cid_text, root_text
from protocols.rpc import events

EXPERTS_PAUSE_S = 0.2


async def subscribe(
    app: App, request: events.SubscribeRequest, context: Context
) -> events.SubscribeResult:
    """Sends events until it is cancelled.

    `release` and `update` (a model's root moved), `peer_up` and `peer_down`, and `experts` (who
    holds what has changed; several changes at once are told as one).
    """
    count = 0

    def tell(event: str, data: Mapping[str, Any]) -> None:
        nonlocal count
        count += 1
        context.notify(events.Event(event=event, time=time.time(), data=dict(data)))

    async with trio.open_nursery() as nursery:
        context.on_cancel(nursery.cancel_scope.cancel)
        nursery.start_soon(_chain, app, tell)
        nursery.start_soon(_peers, app, tell)
        nursery.start_soon(_experts, app, tell)
    return events.SubscribeResult(events=count)


async def _chain(app: App, tell: Any) -> None:
    with app.chain.events() as received:
        async for event in received:
            about = {"model": cid_text(event.model), "root": root_text(event.root)}
            if isinstance(event, ReleaseAccepted):
                tell("release", {**about, "block": cid_text(event.release.id)})
            else:
                header = event.update.header
                block = {"block": cid_text(event.update.id), "subject": header.subject}
                tell("update", {**about, **block})


async def _peers(app: App, tell: Any) -> None:
    with app.network.peer_events() as received:
        async for event in received:
            about = {"peer_id": event.peer.peer_id, "role": event.peer.role}
            tell("peer_up" if isinstance(event, PeerUp) else "peer_down", about)


async def _experts(app: App, tell: Any) -> None:
    seen = app.adverts.changes.count
    while True:
        seen = await app.adverts.changes.wait(seen)
        held = sum(1 for _ in app.adverts.directory.experts())
        tell("experts", {"held": held})
        await trio.sleep(EXPERTS_PAUSE_S)
