"""`testnet up|status|kill|restart|down`: a network of real daemons on this machine."""

import click

from cli.launch import launch
from cli.shared import Group, absolute, folders

_dir = click.option(
    "--dir",
    "folder",
    metavar="DIR",
    required=True,
    help="Where the testnet is.",
    shell_complete=folders,
)


@click.group(cls=Group)
def testnet() -> None:
    """A network of real daemons on this machine's loopback."""


@testnet.command()
@_dir
@click.option("--nodes", metavar="N", type=int, required=True, help="How many daemons.")
@click.option(
    "--roles", metavar="main,gpu,…", help="Their roles; one main and gpu nodes if not set."
)
@click.option("--memory", metavar="SIZE", help="Memory for weights and caches, each.")
@click.option("--hold", metavar="auto|none|LIST", help="Which experts the gpu nodes hold.")
@click.option("--precision", metavar="NAME", help="In which matrices are held for computing.")
def up(folder: str, nodes: int, roles: str | None, **settings: str | None) -> None:
    """Start the daemons; returns when every node is connected to every other."""
    arguments = ["up", "--dir", absolute(folder), "--nodes", str(nodes)]
    launch("testnet", [*arguments, *(["--roles", roles] if roles else [])], settings)


@testnet.command()
@_dir
def status(folder: str) -> None:
    """The daemons and whether they are up."""
    launch("testnet", ["status", "--dir", absolute(folder)])


@testnet.command()
@click.argument("name")
@_dir
def kill(name: str, folder: str) -> None:
    """End one daemon at once, as a crash would (SIGKILL)."""
    launch("testnet", ["kill", name, "--dir", absolute(folder)])


@testnet.command()
@click.argument("name")
@_dir
def restart(name: str, folder: str) -> None:
    """Start one daemon again on its old home and port."""
    launch("testnet", ["restart", name, "--dir", absolute(folder)])


@testnet.command()
@_dir
def down(folder: str) -> None:
    """End all daemons; their homes stay."""
    launch("testnet", ["down", "--dir", absolute(folder)])
