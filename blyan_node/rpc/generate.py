"""`generate.run` and `forward.run`."""

import trio

from blyan_node.parts import App
from blyan_node.rpc.context import Context
from protocols.rpc import generate


async def run(
    app: App, request: generate.GenerateRequest, context: Context
) -> generate.GenerateResult:
    """Answers a prompt; a request that is cancelled once it has begun answers with what it has."""
    cancelled = trio.Event()
    return await app.generation.generate(
        request,
        context.notify,
        progress=context.progress,
        cancelled=cancelled,
        on_begin=lambda: context.on_cancel(cancelled.set),
    )


async def forward(
    app: App, request: generate.ForwardRequest, context: Context
) -> generate.ForwardResult:
    """One pass over a prompt, written to a file."""
    return await app.generation.forward(request, progress=context.progress)
