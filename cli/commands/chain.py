"""`chain status|heads|log|verify|graph` and `block show|drop`."""

import click

from cli import show
from cli.launch import launch
from cli.shared import Group, ask, emit, summary
from cli.values import model_option


@click.group(cls=Group)
def chain() -> None:
    """The DAG of blocks: what is there, who wrote it, whether it all checks."""


@chain.command(help=summary("chain.status"))
def status() -> None:
    """How many blocks there are."""
    emit(ask("chain.status", {}), show.chain_status)


@chain.command(help=summary("chain.heads"))
@model_option("chain.heads")
def heads(model: str | None) -> None:
    """The current block of each part."""
    emit(ask("chain.heads", {"model": model}), show.heads)


@chain.command(help=summary("chain.log"))
@click.option("--after", metavar="N", type=int, help="Begin after this number.")
@click.option("--limit", metavar="N", type=int, help="At most so many blocks.")
def log(after: int | None, limit: int | None) -> None:
    """Blocks in the order of their acceptance."""
    emit(ask("chain.log", {"after": after, "limit": limit}), show.log)


@chain.command(help=summary("chain.verify"))
def verify() -> None:
    """Check every header."""
    emit(ask("chain.verify", {}), show.verified)


@chain.command(help=summary("chain.graph"))
@model_option("chain.graph")
def graph(model: str | None) -> None:
    """The DAG as a Graphviz document."""
    emit(ask("chain.graph", {"model": model}), lambda got: show.say(got["dot"]))


@click.group(cls=Group)
def block() -> None:
    """Single blocks."""


@block.command("show", help=summary("block.show"))
@click.argument("block_id", metavar="ID")
def show_block(block_id: str) -> None:
    """One block."""
    emit(ask("block.show", {"id": block_id}), show.block)


@block.command()
@click.argument("block_id", metavar="ID")
def drop(block_id: str) -> None:
    """Remove a stored block from this home's store; the node must not be running."""
    launch("block-drop", [block_id])
