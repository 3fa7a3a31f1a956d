"""What all commands share: their common options, their errors and their way to the node."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import click
import msgspec
from click.shell_completion import CompletionItem

from cli.client import Answer, Client, NoNode
from cli.terminal import shown
from protocols.errors import ErrorCode, Refused
from protocols.rpc import telling
from protocols.rpc.address import socket_path
from protocols.rpc.codec import Note
from protocols.rpc.table import METHODS

Completions = list[CompletionItem[str]]

EXIT_REFUSED = 1
EXIT_NO_NODE = 2
EXIT_USAGE = 3
EXIT_INTERRUPTED = 130


@dataclass
class Shared:
    """The options that every command takes, before or after its name."""

    home: str | None = None
    rpc: str | None = None
    json: bool = False
    verbose: bool = False

    @property
    def home_path(self) -> str:
        """The node's home, absolute."""
        home = self.home or os.environ.get("BLYAN_HOME") or "~/.blyan"
        return os.path.abspath(os.path.expanduser(home))

    @property
    def explicit_socket(self) -> str | None:
        """The socket that was asked for by option or environment, absolute."""
        path = self.rpc or os.environ.get("BLYAN_RPC")
        return os.path.abspath(os.path.expanduser(path)) if path else None

    @property
    def socket(self) -> str:
        """The node's RPC socket."""
        return self.explicit_socket or socket_path(self.home_path, os.getuid())


def shared_of(context: click.Context) -> Shared:
    """The one `Shared` of this invocation."""
    shared: Shared = context.find_root().ensure_object(Shared)
    return shared


def _set(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        setattr(shared_of(context), str(parameter.name), value)


def files(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Files, which the shell completes itself."""
    return [CompletionItem(incomplete, type="file")]


def folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """Folders, which the shell completes itself."""
    return [CompletionItem(incomplete, type="dir")]


def shared_parameters() -> list[click.Parameter]:
    """New ones of the options that every command takes."""
    return [
        click.Option(
            ["--home"],
            metavar="DIR",
            expose_value=False,
            callback=_set,
            shell_complete=folders,
            help="The node's home. [BLYAN_HOME; default: ~/.blyan]",
        ),
        click.Option(
            ["--rpc"],
            metavar="SOCKET",
            expose_value=False,
            callback=_set,
            shell_complete=files,
            help="The node's RPC socket. [BLYAN_RPC; default: rpc.sock in the home]",
        ),
        click.Option(
            ["--json"],
            is_flag=True,
            expose_value=False,
            callback=_set,
            help="One JSON document on stdout and nothing else.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            expose_value=False,
            callback=_set,
            help="Say more: what is asked of which node, and what a daemon does.",
        ),
    ]


class Command(click.Command):
    """A command that also takes the shared options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(shared_parameters())


class Group(click.Group):
    """A group that also takes the shared options; its commands are loaded when they are used."""

    command_class = Command

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.params.extend(shared_parameters())


Group.group_class = Group


def summary(method: str) -> str:
    """The table's summary of a method, as a command's help."""
    return METHODS[method].summary + "."


def describe(method: str, field: str) -> str:
    """The table's description of a parameter, as an option's help."""
    hints = get_type_hints(METHODS[method].request, include_extras=True)
    return _description(hints[field]) + "."


def _description(annotation: Any) -> str:
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, msgspec.Meta) and item.description:
            return item.description
    return next((text for part in get_args(annotation) if (text := _description(part))), "")


def absolute(path: str) -> str:
    """A file argument as the node sees it: the node may run in another folder."""
    return os.path.abspath(os.path.expanduser(path))


def ask(
    method: str, params: Mapping[str, object], on_note: Callable[[Note], None] | None = None
) -> Any:
    """Calls the node and returns the result; draws progress where the method tells it.

    Parameters that are None are left out; wrong ones are wrong usage, and reach no node. A request
    that Ctrl-C ended is `KeyboardInterrupt`.
    """
    answer = ask_gently(method, params, on_note)
    if answer.interrupted:
        raise KeyboardInterrupt
    return answer.result


def ask_gently(
    method: str, params: Mapping[str, object], on_note: Callable[[Note], None] | None = None
) -> Answer:
    """As `ask`, for requests that have a result even when Ctrl-C ended them."""
    from cli.progress import Progress

    shared = shared_of(click.get_current_context())
    given = checked(method, params)
    if shared.verbose:
        click.echo(f"{shared.socket}: {method} {json.dumps(given)[:1000]}", err=True)
    with Client(shared.socket) as client, Progress() as progress:

        def heed(note: Note) -> None:
            if note.method == "progress":
                progress.show(note.params)
            elif on_note is not None:
                on_note(note)

        try:
            return client.call(method, given, heed)
        except Refused as refused:
            if client.interrupted and refused.code is ErrorCode.CANCELLED:
                raise KeyboardInterrupt from None
            raise


def checked(method: str, params: Mapping[str, object]) -> dict[str, object]:
    """The parameters that are given; raises `click.UsageError` if the table does not allow them."""
    given = {key: value for key, value in params.items() if value is not None}
    try:
        msgspec.convert(given, METHODS[method].request)
    except msgspec.ValidationError as error:
        why = str(error).replace(" - at `$.", " (`").removesuffix(" - at `$`")
        raise click.UsageError(why + (")" if "(`" in why else "")) from None
    return given


def emit(document: Any, plain: Callable[[Any], None]) -> None:
    """Writes a result: as one JSON document, or with `plain` for people."""
    if shared_of(click.get_current_context()).json:
        click.echo(json.dumps(document))
    else:
        plain(document)


def no_node(error: NoNode) -> Refused:
    """What to tell when there is no node to reach."""
    following = "start one with `blyan-node start`, or name its socket with --rpc"
    return Refused(ErrorCode.NO_NODE, str(error), "", following)


def tell(refused: Refused, as_json: bool) -> None:
    """Writes an error: for people on stderr, and with `--json` as a document on stdout."""
    for line in telling.lines(refused):
        click.echo(shown(line, sys.stderr), err=True)
    if as_json:
        click.echo(telling.document(refused))
