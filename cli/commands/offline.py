"""`fsck` and `bench`: what runs without a node."""

import click

from cli.launch import launch
from cli.shared import Command


@click.command(cls=Command)
@click.option("--repair", is_flag=True, help="Drop what is broken; the network brings it back.")
def fsck(repair: bool) -> None:
    """Check every index, chunk and signature of a store; the node must not be running."""
    launch("fsck", ["--repair"] if repair else [])


@click.command(cls=Command)
@click.argument("names", metavar="[NAME]...", nargs=-1)
def bench(names: tuple[str, ...]) -> None:
    """The project's own measurements, each beside its peer or its limit in the same run."""
    launch("bench", names)
