"""`top`: the node and its swarm, live in a terminal, or once."""

import json
import os
import re
import select
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from cli.shared import Command, absolute, files, shared_of
from cli.terminal import console

ANSWER_S_MAX = 30.0
PICTURE_COLUMNS = 110
QUIT = b"qQ\x03\x04\x1b"


@click.command(cls=Command)
@click.option("--once", is_flag=True, help="Print one frame and end, as on a pipe.")
@click.option(
    "--every",
    metavar="SECONDS",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    help="How often to look. [default: 1]",
)
@click.option(
    "--picture",
    metavar="FILE.svg",
    shell_complete=files,
    help="Draw one frame into a file and end.",
)
@click.pass_context
def top(context: click.Context, once: bool, every: float, picture: str | None) -> None:
    """Watch the node: peers, models, experts, traffic and events.

    In a terminal it looks anew every second until you press q or Ctrl-C. Elsewhere, and with
    --once, it looks twice, so that there are rates, and prints one frame; with --json what that
    frame is made of.
    """
    path, as_json = shared_of(context).socket, shared_of(context).json
    if picture is not None:
        _draw(path, every, Path(absolute(picture)))
    elif as_json:
        click.echo(json.dumps(_document(_look_twice(path, every))))
    elif once or not _is_interactive():
        _print(_look_twice(path, every))
    else:
        _watch(path, every)


def _is_interactive() -> bool:
    ours = sys.stdin.isatty() and sys.stdout.isatty()
    return ours and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def _look_twice(path: str, every: float) -> Any:
    """What two polls show, and the events that come meanwhile."""
    from cli.top.feed import Feed
    from cli.top.link import Link

    with Link(path, ANSWER_S_MAX) as link:
        feed = Feed(link)
        feed.subscribe()
        feed.poll()
        feed.settle()
        time.sleep(every)
        feed.poll()
        feed.settle()
        return feed.seen


def _document(seen: Any) -> dict[str, Any]:
    peers = seen.answers["node.peers"]["peers"]
    return {
        "status": seen.answers["node.status"],
        "tokens_per_s": seen.tokens_per_s[-1],
        "peers": [
            {
                "peer_id": peer["peer_id"],
                "role": peer["role"],
                "rtt_ms": peer["rtt_ms"],
                "in_per_s": seen.peer_rate(peer["peer_id"], "in"),
                "out_per_s": seen.peer_rate(peer["peer_id"], "out"),
                "experts": seen.held_by(peer["peer_id"]),
            }
            for peer in peers
        ],
        "models": [
            {**model, "replicas": seen.holders[model["model"]].replicas}
            for model in seen.models
            if model["model"] in seen.holders
        ],
        "experts": seen.answers["expert.stats"],
        "metrics": seen.answers["metrics.read"]["samples"],
        "events": [{k: v for k, v in event.items() if k != "id"} for event in seen.events],
    }


def _print(seen: Any) -> None:
    from cli.top.frame import frame

    shown = console(sys.stdout, 160)
    shown.print(frame(seen, shown.width))


def _draw(path: str, every: float, file: Path) -> None:
    """A frame as a picture of a terminal."""
    import io

    from rich.console import Console

    from cli.top.frame import frame

    drawn = Console(
        file=io.StringIO(), width=PICTURE_COLUMNS, record=True, force_terminal=True, no_color=False
    )
    drawn.print(frame(_look_twice(path, every), drawn.width))
    picture = drawn.export_svg(title="blyan-node top")
    # rich's own fonts come from a server of somebody else's; any fixed one will do.
    file.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))
    click.echo(f"{file}: written", err=True)


def _watch(path: str, every: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from cli.top.feed import Feed
    from cli.top.frame import frame
    from cli.top.keys import Keys
    from cli.top.link import Link

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    with Link(path, ANSWER_S_MAX) as link:
        feed = Feed(link)
        feed.subscribe()
        feed.poll()
        feed.settle()
        screen = Console()
        with Keys() as keys, Live(console=screen, screen=True, auto_refresh=False) as live:

            def draw() -> None:
                feed.seen.silent_s = time.monotonic() - feed.seen.at if feed.waiting else 0.0
                live.update(frame(feed.seen, screen.width, screen.height), refresh=True)

            draw()
            sources: list[Link | Keys] = [link, keys]
            due = time.monotonic() + every
            while True:
                wait = max(0.0, due - time.monotonic())
                ready, _, _ = select.select(sources, [], [], wait)
                if keys in ready:
                    pressed = keys.read()
                    if not pressed or set(pressed) & set(QUIT):
                        return
                if link in ready and feed.take():
                    draw()
                if time.monotonic() >= due:
                    due = time.monotonic() + every
                    if feed.waiting:  # it hangs, or has much to do: say so
                        draw()
                    feed.poll()


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """Ends as after a key, so that the terminal is given back."""
    raise SystemExit(128 + number)
