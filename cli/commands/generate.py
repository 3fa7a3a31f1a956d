"""`generate` and `forward`."""

from typing import Any

import click

from cli import show
from cli.answers import RUN, Printer, answer_options
from cli.shared import (
    EXIT_INTERRUPTED,
    Command,
    absolute,
    ask,
    ask_gently,
    describe,
    emit,
    files,
    shared_of,
    summary,
)
from cli.values import model_option
from protocols.precision import PRECISIONS


class TokenIds(click.ParamType[list[int]]):
    """`1,2,3`."""

    name = "ids"

    def convert(
        self, value: Any, parameter: click.Parameter | None, context: click.Context | None
    ) -> list[int]:
        """The ids of a text of numbers."""
        if isinstance(value, list):
            return value
        pieces = [piece.strip() for piece in str(value).split(",")]
        if not all(piece.isascii() and piece.isdigit() and len(piece) < 12 for piece in pieces):
            self.fail(f"{str(value)[:60]!r} is no list of token ids such as 1,2,3")
        return [int(piece) for piece in pieces]


@click.command(cls=Command, help=summary(RUN))
@model_option(RUN, required=True)
@click.argument("prompt", required=False)
@click.option("--prompt-ids", metavar="1,2,3", type=TokenIds(), help=describe(RUN, "prompt_ids"))
@answer_options
@click.option("--chat", is_flag=True, help=describe(RUN, "chat"))
@click.option("--ignore-eos", is_flag=True, help=describe(RUN, "ignore_eos"))
@click.pass_context
def generate(context: click.Context, /, **params: Any) -> int | None:
    """Answer a prompt, token by token. Ctrl-C ends it; what came so far is the answer."""
    printer = None if shared_of(context).json else Printer()
    answer = ask_gently(RUN, params, None if printer is None else printer.take)
    if printer is not None:
        printer.end_line()
    emit(answer.result, show.stats)
    return EXIT_INTERRUPTED if answer.interrupted else None


@click.command(cls=Command, help=summary("forward.run"))
@model_option("forward.run", required=True)
@click.option(
    "--prompt-ids",
    metavar="1,2,3",
    type=TokenIds(),
    required=True,
    help=describe("forward.run", "prompt_ids"),
)
@click.option(
    "--out",
    metavar="FILE",
    required=True,
    help="The safetensors file to write.",
    shell_complete=files,
)
@click.option("--root", metavar="R", help=describe("forward.run", "root"))
@click.option(
    "--precision", type=click.Choice(PRECISIONS), help=describe("forward.run", "precision")
)
def forward(out: str, **params: Any) -> None:
    """One pass over a prompt, written to a file."""
    emit(ask("forward.run", {**params, "out": absolute(out)}), _written)


def _written(result: dict[str, Any]) -> None:
    show.say(result["out"])
    show.stats(result)
