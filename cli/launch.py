"""Hands over to `python -m blyan_node`, for what needs more than the RPC."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import click

from cli.shared import Shared, shared_of


def launch(verb: str, arguments: Iterable[str] = (), settings: Mapping[str, object] = {}) -> None:
    """Replaces this process by the daemon's program; does not return.

    `settings` are keys of `config.toml`; those that are None are left out.
    """
    shared = shared_of(click.get_current_context())
    line = [sys.executable, *_safe_path(), "-m", "blyan_node", verb, *_shared(verb, shared)]
    for key, value in settings.items():
        if value is not None:
            line += ["--set", f"{key}={json.dumps(value)}"]
    line += arguments
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, line)


def answer(verb: str) -> Any:
    """What a verb of the daemon's program answers, as a document; it tells its own errors."""
    context = click.get_current_context()
    shared = shared_of(context)
    line = [sys.executable, *_safe_path(), "-m", "blyan_node", verb, *_shared(verb, shared)]
    done = subprocess.run(line, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.stdout.buffer.write(done.stdout)
        context.exit(done.returncode)
    return json.loads(done.stdout)


def _shared(verb: str, shared: Shared) -> list[str]:
    line = ["--home", shared.home_path]
    if shared.explicit_socket and verb in ("start", "doctor", "config-show"):
        line += ["--rpc", shared.explicit_socket]
    if shared.json:
        line.append("--json")
    if shared.verbose:
        line.append("--verbose")
    return line


def _safe_path() -> list[str]:
    """A folder called like one of our packages must not shadow it, unless we run from there."""
    return [] if "" in sys.path or os.getcwd() in sys.path else ["-P"]
