"""`init`, `start`, `status`, `id`, `peers`, `stop`."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import click

from cli import show
from cli.client import Client, NoNode
from cli.launch import launch
from cli.shared import Command, absolute, ask, emit, files, shared_of, summary
from protocols.errors import ErrorCode, Refused
from protocols.precision import PRECISIONS

STOP_S_MAX = 15
KERNELS = click.Choice(("auto", "avx512", "avx2", "fma", "torch"))
DEVICES = ("auto", "cpu", "cuda", "mps")
ROLES = click.Choice(("main", "gpu"))
C = TypeVar("C", bound=Any)


def network_option(command: C) -> C:
    """`--network FILE`."""
    said = "The genesis file of the network to join."
    return click.option("--network", metavar="FILE", help=said, shell_complete=files)(command)


def psk_option(said: str) -> Callable[[C], C]:
    """`--psk FILE`."""
    return click.option("--psk", metavar="FILE", help=said, shell_complete=files)


def devices(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """What `--device` may be, for the shell's completion."""
    return [name for name in DEVICES if name.startswith(begun)]


@click.command(cls=Command)
@click.option("--role", type=ROLES, help="main answers prompts, gpu holds experts.")
@network_option
@psk_option("The key of a private network; the home keeps a copy.")
def init(role: str | None, network: str | None, psk: str | None) -> None:
    """Make a node's home: its key, its configuration and its data folder."""
    settings = {"role": role, "psk": absolute(psk) if psk else None}
    launch("init", ["--network", absolute(network)] if network else [], settings)


@click.command(cls=Command)
@click.option("--role", type=ROLES, help="main answers prompts, gpu holds experts.")
@network_option
@click.option("--listen", metavar="MA", multiple=True, help="An address to listen on.")
@click.option("--announce", metavar="MA", multiple=True, help="An address to tell others.")
@click.option("--bootstrap", metavar="MA", multiple=True, help="A node to find others through.")
@click.option("--hold", metavar="auto|none|LIST", help="Which experts to hold.")
@click.option("--memory", metavar="SIZE", help="Memory for weights and caches, such as 8GiB.")
@click.option("--disk", metavar="SIZE", help="The most that the store may take, such as 50GiB.")
@click.option("--threads", metavar="N", type=int, help="Threads that compute.")
@click.option("--replicas", metavar="N", type=int, help="Live holders for every expert.")
@psk_option("The key of a private network.")
@click.option("--allowed-peers", metavar="ID,…", help="Who may take part; all if not set.")
@click.option("--metrics", metavar="IP:PORT", help="Show metrics to Prometheus, on 127.0.0.1:9464.")
@click.option("--log-level", metavar="LEVELS", help="Such as warning, or info,network=debug.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Hold matrices in this precision.")
@click.option(
    "--device", metavar="NAME", shell_complete=devices,
    help="Where to compute: auto, cpu, cuda, cuda:N or mps.",
)  # fmt: skip
@click.option("--kernels", type=KERNELS, help="What computes; auto is the best that runs here.")
@click.option("--hub-endpoint", metavar="URL", help="Where models called hf:ORG/NAME come from.")
def start(network: str | None, psk: str | None, allowed_peers: str | None, **settings: Any) -> None:
    """Run the node in the foreground; make its home first if there is none."""
    settings["psk"] = absolute(psk) if psk else None
    peers = None if allowed_peers is None else [p.strip() for p in allowed_peers.split(",")]
    settings["allowed_peers"] = "all" if peers == ["all"] else peers
    for several in ("listen", "announce", "bootstrap"):
        settings[several] = list(settings[several]) or None
    launch("start", ["--network", absolute(network)] if network else [], settings)


@click.command(cls=Command, help=summary("node.status"))
def status() -> None:
    """What the node is, does and waits for."""
    emit(ask("node.status", {}), show.status)


@click.command("id", cls=Command, help=summary("node.id"))
def show_id() -> None:
    """The node's peer id and addresses."""
    emit(ask("node.id", {}), show.identity)


@click.command(cls=Command, help=summary("node.peers"))
def peers() -> None:
    """The nodes that it is connected to."""
    emit(ask("node.peers", {}), show.peers)


@click.command(cls=Command, help=summary("node.stop"))
def stop() -> None:
    """Drain and stop the node; returns when it is gone."""
    path = shared_of(click.get_current_context()).socket
    with Client(path) as client:
        process = client.process
        result = client.call("node.stop", {}).result
    end = time.monotonic() + STOP_S_MAX
    while _is_there(path, process):
        if time.monotonic() > end:
            raise Refused(
                ErrorCode.TIMEOUT,
                "the node has not stopped",
                f"it is still there after {STOP_S_MAX} s",
                "look into its log",
            )
        time.sleep(0.05)
    emit(result, lambda _: click.echo("stopped"))


def _is_there(path: str, process: int | None) -> bool:
    """Whether the node still runs: its process, or where that is not known its socket."""
    if process is not None:
        try:
            with open(f"/proc/{process}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            pass
    try:
        with Client(path):
            return True
    except NoNode:
        return False
