"""What `generate` and `chat` share: the options of an answer, and how it is shown as it comes."""

import sys
from typing import Any, TypeVar

import click

from cli.shared import describe
from cli.terminal import dim, shown
from protocols.precision import PRECISIONS
from protocols.rpc.codec import Note

RUN = "generate.run"

_OPTIONS = (
    ("--max-tokens", "K", int),
    ("--temperature", "T", float),
    ("--top-k", "K", int),
    ("--top-p", "P", float),
    ("--min-p", "P", float),
    ("--repetition-penalty", "R", float),
    ("--seed", "S", int),
    ("--root", "R", str),
    ("--precision", None, click.Choice(PRECISIONS)),
)
_EFFORTS = click.Choice(["low", "medium", "high"])
C = TypeVar("C", bound=Any)


def answer_options(command: C) -> C:
    """Adds the options that say how an answer is made."""
    said = describe(RUN, "stop").removesuffix(".") + "; may be given several times."
    command = click.option("--stop", metavar="TEXT", multiple=True, help=said)(command)
    said = describe(RUN, "reasoning_effort")
    command = click.option("--reasoning-effort", type=_EFFORTS, help=said)(command)
    for name, metavar, kind in reversed(_OPTIONS):
        said = describe(RUN, name.removeprefix("--").replace("-", "_"))
        command = click.option(name, metavar=metavar, type=kind, help=said)(command)
    return command


class Printer:
    """Writes an answer as it streams: its text on stdout, its reasoning on stderr, dim."""

    def __init__(self) -> None:
        self._thinking = False
        self._open = False  # a line of text has begun that has not ended

    def take(self, note: Note) -> None:
        """One message of the stream."""
        if note.method != "generate.token":
            return
        text, reasoning = note.params["text"], note.params.get("reasoning")
        if reasoning:
            said = shown(reasoning, sys.stderr)
            click.echo(dim(said, sys.stderr), nl=False, err=True)
            self._thinking = True
        if text is None:
            text = f"{note.params['token_id']} "
        if text:
            self._end_thinking()
            click.echo(shown(text, sys.stdout), nl=False)
            self._open = not text.endswith("\n")

    def end_line(self) -> None:
        """Ends a line that has begun."""
        self._end_thinking()
        if self._open:
            self._open = False
            click.echo()

    def _end_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            click.echo(err=True)
