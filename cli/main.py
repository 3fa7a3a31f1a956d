"""The `blyan-node` command: parses, calls, and turns every error into words and an exit code.

Exit codes: 0 done, 1 the node answered with an error, 2 no node to reach, 3 wrong usage, 130
interrupted by Ctrl-C (the node has then ended the request).
"""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from cli.client import NoNode
from cli.shared import (
    EXIT_INTERRUPTED,
    EXIT_NO_NODE,
    EXIT_REFUSED,
    EXIT_USAGE,
    Group,
    no_node,
    shared_of,
    tell,
)
from cli.terminal import hush, open_missing
from protocols.errors import ErrorCode, Refused, RemoteProtocolError

# Command → (module, attribute). A module is imported when its command is used or listed.
COMMANDS = {
    "init": ("node", "init"),
    "start": ("node", "start"),
    "status": ("node", "status"),
    "id": ("node", "show_id"),
    "peers": ("node", "peers"),
    "stop": ("node", "stop"),
    "config": ("config", "config"),
    "doctor": ("doctor", "doctor"),
    "network": ("network", "network"),
    "testnet": ("testnet", "testnet"),
    "model": ("model", "model"),
    "expert": ("expert", "expert"),
    "generate": ("generate", "generate"),
    "chat": ("chat", "chat"),
    "forward": ("generate", "forward"),
    "chain": ("chain", "chain"),
    "block": ("chain", "block"),
    "events": ("events", "events"),
    "top": ("top", "top"),
    "fsck": ("offline", "fsck"),
    "bench": ("offline", "bench"),
    "rpc": ("rpc", "rpc"),
    "completion": ("completion", "completion"),
}


class Root(Group):
    """The top of the command, whose parts are imported one by one."""

    def list_commands(self, context: click.Context) -> list[str]:
        """The names of all commands, in the order in which people need them."""
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Imports and returns a command; None for an unknown name."""
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name]
        found: click.Command = getattr(importlib.import_module(f"cli.commands.{module}"), attribute)
        return found

    def invoke(self, context: click.Context) -> object:
        """Runs the command that is named, or says the version and runs none."""
        if context.params.pop("version"):
            from cli.version import show_version

            show_version(shared_of(context))
            return None
        return super().invoke(context)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    help="Say the version, the commit, and what a node that runs says of its own; no more.",
)
def root() -> None:
    """Blyan: Mixture-of-Experts models on a block DAG, run by the machines of a swarm."""


def main() -> None:
    """The console script."""
    open_missing()
    sys.exit(run())


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "_BLYAN_NODE_COMPLETE" in os.environ:
        importlib.import_module("cli.completion")  # a shell asks: it brings the answers' form
    refused, code = _outcome(given)
    try:
        if refused is not None:
            # Asked of the words themselves, since they may be what could not be parsed.
            tell(refused, "--json" in given)
    except OSError:  # nobody reads it, or nothing can be written there
        pass
    hush()
    return code


def _outcome(arguments: list[str]) -> tuple[Refused | None, int]:
    """What to tell, if it went wrong, and the exit code."""
    try:
        code = root.main(args=arguments, prog_name="blyan-node", standalone_mode=False)
        return None, code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return Refused(ErrorCode.INVALID_PARAMS, "a command is missing", ""), EXIT_USAGE
    except click.UsageError as error:
        return _usage(error), EXIT_USAGE
    except click.ClickException as error:
        return Refused(ErrorCode.BAD_INPUT, error.format_message(), ""), EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return Refused(ErrorCode.CANCELLED, "interrupted", ""), EXIT_INTERRUPTED
    except NoNode as error:
        return no_node(error), EXIT_NO_NODE
    except Refused as refused:
        return refused, EXIT_REFUSED
    except RemoteProtocolError as error:
        bad = Refused(ErrorCode.BAD_INPUT, f"cannot use {error.where}", error.why)
        return bad, EXIT_USAGE
    except BrokenPipeError:  # whoever read our output has had enough
        return None, EXIT_REFUSED
    except OSError as error:
        path = error.filename or "a file"
        reason = error.strerror or str(error)
        return Refused(ErrorCode.BAD_INPUT, f"cannot use {path}", reason), EXIT_USAGE


def _usage(error: click.UsageError) -> Refused:
    command = error.ctx.command_path if error.ctx is not None else "blyan-node"
    return Refused(
        ErrorCode.INVALID_PARAMS,
        "wrong usage",
        error.format_message(),
        f"`{command} --help` says what it takes",
    )


if __name__ == "__main__":
    main()
