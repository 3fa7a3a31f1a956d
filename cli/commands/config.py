"""`config show`: what a node goes by, and where each value came from."""

import time
from typing import Any

import click

from cli import show
from cli.client import Client, NoNode
from cli.launch import answer
from cli.shared import Group, ask, emit, shared_of, summary


@click.group(cls=Group)
def config() -> None:
    """The configuration."""


@config.command("show", help=f"{summary('node.config')} Of a node that is down: what it would use.")
@click.option("--stored", is_flag=True, help="What a start would use now, even if the node runs.")
@click.pass_context
def show_config(context: click.Context, stored: bool) -> None:
    """Every setting, its value and its source."""
    shared = shared_of(context)
    if stored or (shared.rpc is None and not _runs(shared.socket)):
        emit(answer("config-show"), plain)
    else:
        emit(ask("node.config", {}), plain)


def _runs(path: str) -> bool:
    try:
        with Client(path):
            return True
    except NoNode:
        return False


def plain(document: dict[str, Any]) -> None:
    """The settings for people."""
    state = "in use" if document["running"] else "at the next start"
    show.say(f"{document['home']}, {state}")
    show.table(
        ("key", "value", "from"),
        ((s["key"], _value(s), _origin(s)) for s in document["settings"]),
        "no settings",
    )


def _value(setting: dict[str, Any]) -> str:
    value = setting["value"]
    if setting["key"] in ("memory", "disk") and isinstance(value, int):
        return show.size(value)
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "not set" if value is None else str(value)


def _origin(setting: dict[str, Any]) -> str:
    origin = {
        "default": "default",
        "file": f"config.toml line {setting['line']}",
        "environment": str(setting["variable"]),
        "option": "option",
    }[setting["source"]]
    if setting["reloaded"] is not None:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(setting["reloaded"]))
        origin += f", since the reload of {when}"
    if setting["waiting"]:
        origin += "; config.toml has another, which waits for the next start"
    return origin
