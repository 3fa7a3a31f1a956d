"""`generate` and `forward`."""

from typing import Any

import click

from cli import show
from cli.shared import (
    Command,
    absolute,
    ask,
    ask_gently,
    describe,
    emit,
    model_option,
    shared_of,
    summary,
)
from protocols.rpc.codec import Note

RUN = "generate.run"


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
@click.option("--max-tokens", metavar="K", type=int, help=describe(RUN, "max_tokens"))
@click.option("--temperature", metavar="T", type=float, help=describe(RUN, "temperature"))
@click.option("--top-p", metavar="P", type=float, help=describe(RUN, "top_p"))
@click.option("--seed", metavar="S", type=int, help=describe(RUN, "seed"))
@click.option("--root", metavar="R", help=describe(RUN, "root"))
@click.option("--chat", is_flag=True, help=describe(RUN, "chat"))
@click.option("--ignore-eos", is_flag=True, help=describe(RUN, "ignore_eos"))
@click.pass_context
def generate(context: click.Context, /, **params: Any) -> int | None:
    """Answer a prompt, token by token. Ctrl-C ends it; what came so far is the answer."""
    as_json = shared_of(context).json

    def print_token(note: Note) -> None:
        if note.method == "generate.token" and not as_json:
            text = note.params["text"]
            click.echo(f"{note.params['token_id']} " if text is None else text, nl=False)

    answer = ask_gently(RUN, params, print_token)
    emit(answer.result, _end)
    return 130 if answer.interrupted else None


def _end(result: dict[str, Any]) -> None:
    click.echo()
    show.stats(result)


@click.command(cls=Command, help=summary("forward.run"))
@model_option("forward.run", required=True)
@click.option(
    "--prompt-ids",
    metavar="1,2,3",
    type=TokenIds(),
    required=True,
    help=describe("forward.run", "prompt_ids"),
)
@click.option("--out", metavar="FILE", required=True, help="The safetensors file to write.")
@click.option("--root", metavar="R", help=describe("forward.run", "root"))
def forward(out: str, **params: Any) -> None:
    """One pass over a prompt, written to a file."""
    emit(ask("forward.run", {**params, "out": absolute(out)}), _written)


def _written(result: dict[str, Any]) -> None:
    click.echo(result["out"])
    show.stats(result)
