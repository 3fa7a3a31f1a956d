"""The man page of `blyan-node`, made from the commands, which are made from the RPC's table.

To bring it up to date:

    python -m cli.manual > packaging/man/blyan-node.1
"""

import re
from collections.abc import Iterator, Sequence

import click

from cli.main import root
from cli.shared import shared_parameters

_EXITS = (
    ("0", "Done."),
    ("1", "The node answered with an error."),
    ("2", "There is no node to reach."),
    ("3", "Wrong usage, or a file or a configuration that cannot be used."),
    ("130", "Interrupted with Ctrl-C; the node has then ended the request."),
)
_ENVIRONMENT = (
    ("BLYAN_HOME", "The node's home, where --home is not given."),
    ("BLYAN_RPC", "The node's RPC socket, where --rpc is not given."),
    ("HF_ENDPOINT", "The hub that models called hf:ORG/NAME come from, if config.toml has none."),
    ("NO_COLOR", "If set and not empty, nothing is drawn with colours or other codes."),
    ("TERM", "dumb, or none at all: likewise, and progress comes in plain lines."),
)
_FILES = (
    ("~/.blyan", "The home of a node, if none is named."),
    ("HOME/config.toml", "What the operator may change; every key is explained in it."),
    ("HOME/identity.key", "The node's secret seed, readable by its owner alone."),
    ("HOME/network.json", "The genesis of the network that the node is in."),
    ("HOME/data/", "The blocks."),
    ("HOME/rpc.sock", "The RPC, while the node runs."),
)
_SIGNALS = (
    ("SIGINT, SIGTERM", "The node drains and ends, within 10 seconds; asked twice, at once."),
    ("SIGHUP", "It reads config.toml again, and says in its log what has to wait for a start."),
)


def page() -> str:
    """The whole page, in the man macros."""
    context = click.Context(root, info_name="blyan-node")
    lines = [
        '.\\" Made by `python -m cli.manual`; a test checks that it is current.',
        '.TH BLYAN\\-NODE 1 "" "Blyan" "User Commands"',
        ".SH NAME",
        "blyan\\-node \\- " + _text(_lower(root.help or "")),
        ".SH SYNOPSIS",
        ".B blyan\\-node",
        '.RI [ OPTION "]... " COMMAND " [" ARGUMENT ]...',
        ".SH DESCRIPTION",
        _text(
            "A thin client of the daemon that `blyan-node start` runs: it calls the daemon's RPC "
            "over a unix socket. The options below may stand before or after the command. Errors "
            "go to standard error: what happened, why, and what to do next."
        ),
        ".SH OPTIONS",
        *_tagged(shared_parameters(), context),
        *_tagged([p for p in root.params if p.name == "version"], context),
        ".SH COMMANDS",
    ]
    for path, command in _commands(root, ("blyan-node",), context):
        lines += _command(path, command, context)
    for title, rows in (
        ("EXIT STATUS", _EXITS),
        ("ENVIRONMENT", _ENVIRONMENT),
        ("FILES", _FILES),
        ("SIGNALS", _SIGNALS),
    ):
        lines.append(f".SH {title}")
        for term, about in rows:
            lines += [".TP", f".B {_text(term)}", _text(about)]
    lines += [
        ".SH SEE ALSO",
        _text("docs/ in the source: rpc.md, service.md, models.md."),
    ]
    return "\n".join(lines) + "\n"


def _commands(
    group: click.Group, path: tuple[str, ...], context: click.Context
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command that does something, with the words that call it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name), context)
        else:
            yield (*path, name), command


def _command(path: tuple[str, ...], command: click.Command, context: click.Context) -> list[str]:
    shared = {parameter.name for parameter in shared_parameters()}
    own = [p for p in command.params if isinstance(p, click.Option) and p.name not in shared]
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    words = " ".join([*path[1:], *(argument.make_metavar(context) for argument in arguments)])
    paragraphs = re.split(r"\n\s*\n", (command.help or "").strip())
    lines = [f".SS {_text(words)}", _text(paragraphs[0])]
    for paragraph in paragraphs[1:]:
        lines += [".PP", _text(paragraph)]
    return lines + _tagged(own, context)


def _tagged(options: Sequence[click.Parameter], context: click.Context) -> list[str]:
    """Options with what they mean; those whose help is hidden are left out."""
    lines = []
    for option in options:
        record = option.get_help_record(context)
        if record is not None:
            lines += [".TP", f".B {_text(record[0])}", _text(record[1])]
    return lines


def _lower(text: str) -> str:
    """A title as the NAME section has it: without the name and the full stop."""
    return text.strip().partition(": ")[2].rstrip(".") or text.strip()


def _text(text: str) -> str:
    """Text in which nothing is a request or an escape of roff, on one line."""
    flat = " ".join(text.replace("`", "").split())
    escaped = flat.replace("\\", "\\e").replace("-", "\\-").replace("…", "...")
    return "\\&" + escaped if escaped[:1] in (".", "'") else escaped


if __name__ == "__main__":
    print(page(), end="")
