"""`--version`: this command's version and commit, and what the node that runs says of its own."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import click

from cli import show
from cli.client import Client, NoNode
from cli.shared import Shared, emit
from protocols import build
from protocols.errors import Refused

ANSWER_S_MAX = 2.0


def version() -> str:
    """The version of this package."""
    try:
        return distribution(build.PACKAGE).version
    except PackageNotFoundError:  # run from a folder that nothing has installed
        return "unknown"


def commit() -> str | None:
    """The commit that this command was made from, None where nothing tells; runs no git."""
    try:
        direct_url = distribution(build.PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        direct_url = None
    return build.commit(_read, direct_url)


def show_version(shared: Shared) -> None:
    """Writes both; a node is asked for a moment, and one that is not there is no error."""
    document: dict[str, Any] = {"version": version(), "commit": commit(), "node": _node(shared)}
    emit(document, lambda made: _plain(made, shared))


def _plain(document: dict[str, Any], shared: Shared) -> None:
    click.echo(f"{build.PACKAGE} {build.shown(document['version'], document['commit'])}")
    node = document["node"]
    if node is None:
        click.echo(f"node: none answers on {shared.socket}; it would say its numeric profile")
    else:
        show.say(f"node: {build.shown(node['version'], node['commit'])}")
        show.say(f"profile: {node['profile']}")


def _node(shared: Shared) -> dict[str, Any] | None:
    try:
        with Client(shared.socket, answer_s_max=ANSWER_S_MAX) as client:
            said = client.call("node.status", {}).result
        return {key: said.get(key) for key in ("version", "commit", "profile")}
    except (NoNode, Refused, AttributeError):  # the last: what answers is no node of ours
        return None


def _read(path: str) -> str | None:
    try:
        return (Path(__file__).parents[1] / path).read_text()
    except (OSError, ValueError):
        return None
