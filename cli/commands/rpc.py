"""`rpc METHOD [JSON]`: any method."""

import json
from typing import Any

import click

from cli.client import Client
from cli.shared import Command, shared_of
from cli.values import methods
from protocols.rpc.codec import Note


@click.command(cls=Command)
@click.argument("method", shell_complete=methods)
@click.argument("params", metavar="[JSON]", default="{}")
@click.pass_context
def rpc(context: click.Context, method: str, params: str) -> int | None:
    """Call any method with a JSON object of parameters; `rpc.discover` lists them."""
    shared = shared_of(context)
    named = _object(params)

    def note_line(note: Note) -> None:
        if not shared.json:
            click.echo(json.dumps({"method": note.method, "params": note.params}), err=True)

    with Client(shared.socket) as client:
        answer = client.call(method, named, note_line)
    click.echo(json.dumps(answer.result, indent=None if shared.json else 2))
    return 130 if answer.interrupted else None


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"it is no JSON: {error}", param_hint="JSON") from None
    if not isinstance(found, dict):
        raise click.BadParameter("parameters are named: write an object", param_hint="JSON")
    return found
