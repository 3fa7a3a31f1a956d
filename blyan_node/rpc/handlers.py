"""Which function answers which method of the table."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from blyan_node.parts import App
from blyan_node.rpc import (
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
    publish,
)
from blyan_node.rpc.connection import Bound
from blyan_node.rpc.context import Context

Handler = Callable[[App, Any, Context], Awaitable[object]]

HANDLERS: Mapping[str, Handler] = {
    "node.status": node.status,
    "node.id": node.show_id,
    "node.peers": node.peers,
    "node.stop": node.stop,
    "node.config": config.show,
    "node.doctor": doctor.run,
    "network.show": node.network,
    "model.publish": publish.publish,
    "model.dry_run": publish.dry_run,
    "model.list": model.list_models,
    "model.show": model.show,
    "model.fetch": model.fetch,
    "model.verify": model.verify,
    "model.wait": model.wait,
    "model.export": model.export,
    "model.update": model.update,
    "expert.list": expert.list_experts,
    "expert.where": expert.where,
    "expert.hold": expert.hold,
    "expert.drop": expert.drop,
    "expert.stats": expert.stats,
    "generate.run": generate.run,
    "forward.run": generate.forward,
    "chain.status": chain.status,
    "chain.heads": chain.heads,
    "chain.log": chain.log,
    "chain.verify": chain.verify,
    "chain.graph": chain.graph,
    "block.show": chain.show_block,
    "events.subscribe": events.subscribe,
    "metrics.read": metrics.read,
    "rpc.discover": calls.discover,
    "rpc.cancel": calls.cancel,
}


def handlers(app: App) -> dict[str, Bound]:
    """The handlers of one node."""
    return {name: partial(handler, app) for name, handler in HANDLERS.items()}
