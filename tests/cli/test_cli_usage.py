"""Wrong use of every command: exit code 3, what and why on stderr, a document with --json."""

from collections.abc import Callable
from typing import Any

import click
import pytest

from cli.main import COMMANDS, root

WRONG = [
    (),
    ("nothing",),
    ("--nothing",),
    ("init", "--role", "boss"),
    ("init", "extra"),
    ("start", "--role", "boss"),
    ("start", "--threads", "many"),
    ("start", "--precision", "int4"),
    ("status", "extra"),
    ("id", "extra"),
    ("peers", "extra"),
    ("stop", "--now"),
    ("network",),
    ("config",),
    ("config", "show", "extra"),
    ("network", "new"),
    ("network", "new", "--name", "x"),
    ("network", "new", "--name", "No Name", "--out", "/nowhere/x.json"),
    ("testnet",),
    ("testnet", "up", "--nodes", "2"),
    ("testnet", "up", "--dir", "x"),
    ("testnet", "up", "--dir", "x", "--nodes", "two"),
    ("testnet", "kill", "--dir", "x"),
    ("testnet", "restart", "--dir", "x"),
    ("testnet", "down"),
    ("testnet", "status"),
    ("model",),
    ("model", "publish"),
    ("model", "publish", "path"),
    ("model", "publish", "path", "--name", "No Name"),
    ("model", "publish", "path", "--name", "n", "--wait-replicas", "0"),
    ("model", "show"),
    ("model", "fetch"),
    ("model", "fetch", "n", "--root", "abc"),
    ("model", "verify"),
    ("model", "wait", "n"),
    ("model", "wait", "n", "--replicas", "0"),
    ("model", "wait", "n", "--replicas", "x"),
    ("model", "export", "n"),
    ("model", "update", "n"),
    ("model", "update", "n", "--subject", "layer0.expert0"),
    ("expert",),
    ("expert", "where"),
    ("expert", "hold"),
    ("expert", "drop", "--force"),
    ("expert", "stats", "extra"),
    ("top", "extra"),
    ("doctor", "extra"),
    ("top", "--every", "never"),
    ("top", "--every", "0"),
    ("generate",),
    ("generate", "--model", "n"),
    ("generate", "--model", "n", "prompt", "--prompt-ids", "1"),
    ("generate", "--model", "n", "--prompt-ids", "1,x"),
    ("generate", "--model", "n", "--prompt-ids", ""),
    ("generate", "--model", "n", "--prompt-ids", "1", "--chat"),
    ("generate", "--model", "n", "p", "--max-tokens", "0"),
    ("generate", "--model", "n", "p", "--temperature", "-1"),
    ("generate", "--model", "n", "p", "--top-p", "2"),
    ("generate", "--model", "n", "p", "--seed", "-1"),
    ("generate", "--model", "n", "p", "--top-k", "-1"),
    ("generate", "--model", "n", "p", "--min-p", "1.5"),
    ("generate", "--model", "n", "p", "--repetition-penalty", "0"),
    ("generate", "--model", "n", "p", "--stop", ""),
    ("chat",),
    ("chat", "--model", "n", "extra"),
    ("chat", "--model", "n", "--top-p", "2"),
    ("chat", "--model", "n", "--max-tokens", "0"),
    ("forward", "--model", "n", "--prompt-ids", "1"),
    ("forward", "--model", "n", "--out", "x"),
    ("chain",),
    ("chain", "status", "extra"),
    ("chain", "heads", "--model"),
    ("chain", "log", "--limit", "0"),
    ("chain", "log", "--after", "-1"),
    ("chain", "verify", "extra"),
    ("chain", "graph", "extra"),
    ("block",),
    ("block", "show"),
    ("block", "drop"),
    ("events", "extra"),
    ("fsck", "extra"),
    ("bench", "--nothing"),
    ("rpc",),
    ("rpc", "node.status", "[1]"),
    ("rpc", "node.status", "{"),
    ("completion",),
    ("completion", "tcsh"),
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_use_is_exit_3_and_says_why(
    arguments: tuple[str, ...], command: Callable[..., Any]
) -> None:
    said = command(*arguments)
    assert said.code == 3
    assert said.out == ""
    assert "error: " in said.err


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_use_with_json_is_a_document_too(
    arguments: tuple[str, ...], command: Callable[..., Any]
) -> None:
    said = command("--json", *arguments)
    assert said.code == 3
    error = said.json["error"]
    assert set(error) == {"code", "message", "data"}


def test_every_command_is_used_wrongly_somewhere() -> None:
    every = {" ".join(path) for path in _leaves(root, ())}
    tried = {" ".join(arguments[:2]) for arguments in WRONG} | {
        arguments[0] for arguments in WRONG if arguments
    }
    harmless = {"model list", "expert list"}  # they take nothing that could be wrong but options
    assert not every - tried - harmless


def test_every_command_has_help(command: Callable[..., Any]) -> None:
    for path in _leaves(root, ()):
        said = command(*path, "--help")
        assert said.code == 0
        for option in ("--home", "--rpc", "--json", "--verbose"):
            assert option in said.out


def _leaves(group: click.Group, path: tuple[str, ...]) -> list[tuple[str, ...]]:
    context = click.Context(group)
    found = []
    for name in group.list_commands(context):
        sub = group.get_command(context, name)
        assert sub is not None
        here = (*path, name)
        found += _leaves(sub, here) if isinstance(sub, click.Group) else [here]
    return found


def test_the_root_lists_what_it_has() -> None:
    assert set(root.list_commands(click.Context(root))) == set(COMMANDS)
