"""`rpc.*`."""

from typing import Any

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from protocols.rpc import calls, openrpc


async def discover(app: App, request: calls.DiscoverRequest, context: Context) -> dict[str, Any]:
    """The OpenRPC document of all methods."""
    return openrpc.document(app.version)


async def cancel(app: App, request: calls.CancelRequest, context: Context) -> calls.CancelResult:
    """Ends a request of the same connection early."""
    return calls.CancelResult(cancelled=context.client.cancel(request.id))
