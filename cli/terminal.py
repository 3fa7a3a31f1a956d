"""What a stream can show: colours and bars on a terminal that wants them, else plain text."""

import os
import re
import sys
from contextlib import suppress
from typing import IO, TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_TERMINALS = ("", "dumb", "unknown")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def decorated(stream: IO[str]) -> bool:
    """Whether codes for colours and for the cursor belong on a stream.

    They do on a terminal, unless it is a dumb one or NO_COLOR (https://no-color.org) is set.
    """
    wanted = not os.environ.get("NO_COLOR")
    return wanted and stream.isatty() and os.environ.get("TERM", "") not in _PLAIN_TERMINALS


def shown(text: str, stream: IO[str]) -> str:
    """Text from elsewhere: nothing in it moves a terminal's cursor or changes its colours."""
    return _CONTROL.sub("", text) if stream.isatty() else text


def dim(text: str, stream: IO[str]) -> str:
    """Text as an aside, where the stream can show it."""
    return click.style(text, dim=True) if decorated(stream) else text


def console(stream: IO[str], width: int | None = None) -> "Console":
    """rich's console for a stream; `width` is what there is off a terminal."""
    from rich.console import Console

    terminal = stream.isatty()
    return Console(
        file=stream,
        width=None if terminal else width,
        force_terminal=terminal,  # nor do FORCE_COLOR and its like bring codes into a pipe
        color_system="auto" if decorated(stream) else None,
    )


def open_missing() -> None:
    """A stream that whoever started us has closed leads nowhere: else the next file that is opened
    would take its number, and be written to.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            taken = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(taken, True)
            setattr(sys, name, os.fdopen(taken, "w" if number else "r"))


def hush() -> None:
    """Whoever reads our output has had enough: what is still written goes nowhere, in silence."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # closed, or no file at all
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
