"""`doctor`: why a node cannot be reached or cannot keep up, and what to do."""

import click

from cli.launch import launch
from cli.shared import Command


@click.command(cls=Command)
def doctor() -> None:
    """Say why the node cannot be reached or cannot keep up, and what to do; 1 if it is bad."""
    launch("doctor")
