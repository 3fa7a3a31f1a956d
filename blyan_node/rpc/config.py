"""`node.config`."""

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from protocols.rpc import config


async def show(app: App, request: config.ConfigRequest, context: Context) -> config.ConfigResult:
    """What the node goes by, and where each value came from."""
    return app.in_use.told()
