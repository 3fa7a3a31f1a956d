"""`chat`: a conversation with a model, in a terminal or on a pipe."""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import click

from cli import show
from cli.answers import RUN, Printer, answer_options
from cli.client import Answer, NoNode
from cli.shared import (
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    Command,
    Shared,
    ask,
    ask_gently,
    checked,
    no_node,
    shared_of,
    tell,
)
from cli.terminal import dim
from cli.values import model_option
from protocols.errors import ErrorCode, Refused

MAX_TOKENS = 1024
HELP = """\
/reset   forget what was said
/help    show this
/quit    leave, as Ctrl-D does
Ctrl-C   ends the answer that is being written, and leaves when there is none
A line that begins with a space is said as it is."""


@click.command(cls=Command)
@model_option(RUN, required=True)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@answer_options
@click.pass_context
def chat(context: click.Context, /, system: str | None, **params: Any) -> int | None:
    """Talk with a model.

    Every line is a message, and each answer is made from all that was said. In a terminal, /help
    lists what else there is. On a pipe, every line is answered in turn; with --json each answer is
    one document on a line.
    """
    if params["max_tokens"] is None:
        params["max_tokens"] = MAX_TOKENS
    talk = Conversation(shared_of(context), params, system)
    checked(RUN, {**params, "messages": talk.messages("")})
    ask("model.show", {"model": params["model"]})
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if talk.in_terminal:
        said = f"{params['model']}: /help lists commands, Ctrl-D leaves"
        click.echo(dim(said, sys.stderr), err=True)
    read = _line_editor() if talk.in_terminal else _pipe
    while (line := read()) is not None:
        try:
            if not (talk.obey(line.strip()) if line.startswith("/") else talk.say(line.strip())):
                break
        except KeyboardInterrupt:  # it came when there was nothing left to stop
            if not talk.in_terminal:
                raise
    return None if talk.in_terminal else talk.exit_code


@dataclass
class Conversation:
    """What was said so far, and how to go on."""

    shared: Shared
    params: dict[str, Any]
    system: str | None
    history: list[dict[str, str]] = field(default_factory=list)
    exit_code: int | None = None  # of a conversation on a pipe

    @property
    def in_terminal(self) -> bool:
        """Whether somebody sits at both ends."""
        return sys.stdin.isatty() and sys.stdout.isatty() and not self.shared.json

    def messages(self, line: str) -> list[dict[str, str]]:
        """All that the model is to know when it answers `line`."""
        told = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*told, *self.history, {"role": "user", "content": line}]

    def obey(self, command: str) -> bool:
        """Does what a line with a slash says; whether the conversation goes on."""
        if command == "/reset":
            self.history.clear()
            self._note("what was said is forgotten")
        elif command == "/help":
            click.echo(HELP, err=True)
        elif command != "/quit":
            self._note(f"there is no {command.split()[0]}; /help lists what there is")
        return command != "/quit"

    def say(self, line: str) -> bool:
        """Says `line` and shows the answer, or what went wrong; whether to go on after it."""
        answer = self._ask(line) if line else None
        if answer is None:
            return True
        text = answer.result["text"] or ""
        if text:
            self.history += [
                {"role": "user", "content": line},
                {"role": "assistant", "content": text},
            ]
        self._end(answer, text)
        if answer.interrupted:
            self.exit_code = EXIT_INTERRUPTED
        return self.in_terminal or not answer.interrupted

    def _ask(self, line: str) -> Answer | None:
        """The answer; None if there is none, which was then told."""
        printer = Printer()
        try:
            try:
                heed = None if self.shared.json else printer.take
                return ask_gently(RUN, {**self.params, "messages": self.messages(line)}, heed)
            finally:
                printer.end_line()
        except KeyboardInterrupt:
            if not self.in_terminal:
                raise
            self._note("stopped before it began; the question is forgotten")
        except Refused as refused:
            self._tell(refused)
        except NoNode as error:
            self._tell(no_node(error))
        except click.UsageError as error:
            self._tell(Refused(ErrorCode.INVALID_PARAMS, "not sent", error.format_message()))
        return None

    def _end(self, answer: Answer, text: str) -> None:
        """What there is to say after an answer."""
        if self.shared.json:
            click.echo(json.dumps(answer.result))
            return
        if self.shared.verbose:
            show.stats(answer.result)
        if answer.interrupted:
            self._note("stopped")
        elif answer.result["finish"] == "length":
            self._note(self._why_cut(answer.result["stats"]["new_tokens"]))
        if not text:
            self._note("nothing was said; the question is forgotten")

    def _why_cut(self, tokens: int) -> str:
        if tokens < self.params["max_tokens"]:
            return f"cut at {tokens} tokens: the model reads no more; /reset begins anew"
        return f"cut at {tokens} tokens; --max-tokens allows more"

    def _tell(self, refused: Refused) -> None:
        self.exit_code = EXIT_REFUSED
        tell(refused, self.shared.json)

    def _note(self, text: str) -> None:
        if not self.shared.json:
            click.echo(dim(f"[{text}]", sys.stderr), err=True)


def _line_editor() -> Callable[[], str | None]:
    """Reads from a terminal: with line editing where Python has it."""
    line_buffer: Callable[[], str] = str
    with suppress(ImportError):
        import readline

        line_buffer = readline.get_line_buffer

    def read() -> str | None:
        while True:
            try:
                return input("> ")
            except EOFError:
                click.echo()
                return None
            except KeyboardInterrupt:
                click.echo()
                if not line_buffer():
                    return None

    return read


def _pipe() -> str | None:
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None
