"""`events.subscribe`."""

from collections.abc import Callable, Mapping

import trio

from blyan_node.network.interface import PeerUp
from blyan_node.parts import App
from blyan_node.rpc.context import Context
from blyan_node.rpc.subscription import Subscription
from blyan_node.services.chain import ReleaseAccepted
from protocols.ids import cid_text, root_text
from protocols.rpc import events

EXPERTS_PAUSE_S = 0.2
Tell = Callable[[events.EventKind, Mapping[str, object]], None]


async def subscribe(
    app: App, request: events.SubscribeRequest, context: Context
) -> events.SubscribeResult:
    """Sends events until it is cancelled."""
    subscription = Subscription(context.notify, context.room, app.tally)
    async with trio.open_nursery() as nursery:
        context.on_cancel(nursery.cancel_scope.cancel)
        nursery.start_soon(subscription.run)
        for source in (_chain, _peers, _experts):
            nursery.start_soon(source, app, subscription.tell)
    subscription.flush()
    return events.SubscribeResult(events=subscription.sent, dropped=subscription.dropped)


async def _chain(app: App, tell: Tell) -> None:
    with app.chain.events() as received:
        async for event in received:
            about = {"model": cid_text(event.model), "root": root_text(event.root)}
            if isinstance(event, ReleaseAccepted):
                tell("release", {**about, "block": cid_text(event.release.id)})
            else:
                header = event.update.header
                block = {"block": cid_text(event.update.id), "subject": header.subject}
                tell("update", {**about, **block})


async def _peers(app: App, tell: Tell) -> None:
    with app.network.peer_events() as received:
        async for event in received:
            about = {"peer_id": event.peer.peer_id, "role": event.peer.role}
            tell("peer_up" if isinstance(event, PeerUp) else "peer_down", about)


async def _experts(app: App, tell: Tell) -> None:
    seen = app.adverts.changes.count
    while True:
        seen = await app.adverts.changes.wait(seen)
        held = sum(1 for _ in app.adverts.directory.experts())
        tell("experts", {"held": held})
        await trio.sleep(EXPERTS_PAUSE_S)
