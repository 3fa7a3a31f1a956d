"""`events`: what happens, as it happens."""

import json
import time
from typing import Any

import click

from cli.shared import Command, ask, shared_of, summary
from cli.show import say
from protocols.rpc.codec import Note


@click.command(cls=Command, help=summary("events.subscribe"))
@click.pass_context
def events(context: click.Context) -> None:
    """Print events until Ctrl-C."""
    as_json = shared_of(context).json

    def line(note: Note) -> None:
        event = {key: value for key, value in note.params.items() if key != "id"}
        say(json.dumps(event) if as_json else _plain(event))

    ask("events.subscribe", {}, line)


def _plain(event: dict[str, Any]) -> str:
    about = " ".join(f"{key}={value}" for key, value in event["data"].items())
    return f"{time.strftime('%H:%M:%S', time.localtime(event['time']))} {event['event']} {about}"
