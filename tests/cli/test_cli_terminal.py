"""Every command that shows something: on a terminal, a plain one, a pipe, a pipe that breaks."""

import enum
import os
import pty
import subprocess
import sys
import threading
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec
import pytest
import trio

from protocols.rpc.events import Event
from protocols.rpc.table import METHODS

HOUSE = Path(__file__).parents[2]
COMMANDS = [
    "--help", "--version", "status", "id", "peers", "config show", "model list", "model show n",
    "model verify n", "model fetch n", "model wait n --replicas 1", "model publish p --name n",
    "model publish p --name n --dry-run", "expert list", "expert where layer0.expert0",
    "expert hold layer0.expert0", "expert stats", "chain status", "chain heads", "chain log",
    "chain verify", "chain graph", "block show b", "generate --model n hello",
    "forward --model n --prompt-ids 1 --out f", "top --once --every 0.1", "completion bash",
    "rpc node.status", "model nothing",
]  # fmt: skip
RUN_ALL = """
import sys
from cli.main import run
for line in sys.argv[1:]:
    sys.stdout.write(f"--- {line}\\n")
    code = run(line.split())
    sys.stdout.write(f"--- {code}\\n")
    sys.stdout.flush()
"""


def _example(kind: Any, depth: int = 0) -> Any:
    """A value of a type of the RPC, nothing in it empty."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is typing.Annotated:
        return _example(parts[0], depth)
    if origin in (typing.Union, types.UnionType):
        return _example(parts[0], depth)
    if origin is Literal:
        return parts[0]
    if origin in (list, tuple):
        return [_example(parts[0], depth + 1)]
    if origin is dict:
        return {"layer0.expert0": _example(parts[1], depth + 1)}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind, include_extras=True)
        return kind(**{name: _example(hint, depth + 1) for name, hint in hints.items()})
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    return {str: "\x1b[31mtext", int: 7, float: 1.5, bool: True}.get(kind)


@pytest.fixture
def answering(node: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A node that has an answer to everything."""
    for name, method in METHODS.items():
        if name not in ("rpc.cancel", "rpc.discover"):
            node.answers[name] = lambda request, context, kind=method.result: _example(kind)
    monkeypatch.setenv("BLYAN_HOME", str(node.path.parent))
    monkeypatch.setenv("PYTHONPATH", str(HOUSE))
    for variable in ("NO_COLOR", "FORCE_COLOR", "BLYAN_RPC", "COLORTERM"):
        monkeypatch.delenv(variable, raising=False)
    return node


def _on_a_terminal(lines: list[str], **variables: str) -> str:
    """What a terminal gets of all these commands, on stdout and stderr."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", RUN_ALL, *lines], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, **variables},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert child.wait(60) == 0
    text = shown.decode()
    assert "Traceback" not in text, text[-2000:]
    assert text.count("--- ") >= 2 * len(lines)
    return text


def test_a_terminal_gets_colours(answering: Any) -> None:
    assert "\x1b[1m" in _on_a_terminal(["model list"], TERM="xterm-256color")


@pytest.mark.parametrize(
    "variables",
    [{"TERM": "dumb"}, {"TERM": ""}, {"TERM": "xterm-256color", "NO_COLOR": "1"}],
    ids=["dumb", "none", "NO_COLOR"],
)
def test_a_terminal_that_wants_none_gets_no_codes(
    variables: dict[str, str], answering: Any
) -> None:
    shown = _on_a_terminal(COMMANDS, **variables)
    assert "[31mtext" in shown  # what the node says of peers is shown, without its own codes
    assert "\x1b" not in shown, repr(shown[max(0, shown.index("\x1b") - 300) :][:600])


@pytest.mark.parametrize("force", [{}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}])
def test_a_pipe_gets_no_codes(force: dict[str, str], answering: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *COMMANDS], capture_output=True, text=True, check=True,
        env={**os.environ, "TERM": "xterm-256color", **force}, timeout=120,
    )  # fmt: skip
    for text in (done.stdout, done.stderr):
        assert "\x1b" not in text.replace("\x1b[31mtext", "")
        assert "Traceback" not in text
    codes = [line for line in done.stdout.splitlines() if line.startswith("--- ")][1::2]
    assert codes == ["--- 0"] * (len(COMMANDS) - 1) + ["--- 3"], done.stderr[-2000:]


@pytest.fixture
def broken() -> Iterator[int]:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    "words", ["status", "chain graph", "--help", "completion zsh", "--version"]
)
def test_a_reader_that_has_left_ends_a_command_quietly(
    words: str, answering: Any, broken: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words.split()], stdout=broken, stderr=subprocess.PIPE,
        text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_the_daemon_s_own_verbs_end_as_quietly(tmp_path: Path, broken: int) -> None:
    for verb in ("init", "fsck"):
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", verb, "--home", str(tmp_path / "alice")],
            stdout=broken, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert (done.stderr, done.returncode) == ("", 1)
    assert (tmp_path / "alice" / "identity.key").exists()


@pytest.mark.parametrize("words", ["model nothing", "status", "fsck"])
def test_nobody_to_tell_of_an_error_is_no_error(words: str, answering: Any, broken: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words.split()], stdout=broken, stderr=broken,
        check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (1, 3)


@pytest.mark.parametrize(("closed", "words", "code"), [
    (">&-", "status", 0), (">&- 2>&- <&-", "status", 0), (">&- 2>&-", "nothing", 3),
    ("2>/dev/full", "nothing", 3),
])  # fmt: skip
def test_a_stream_that_is_closed_from_the_start_is_no_error(
    closed: str, words: str, code: int, answering: Any
) -> None:
    """Nor is another file, such as the node's socket, written to in its place."""
    line = f'"{sys.executable}" -m cli.main {words} {closed}'
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, check=False, timeout=60, cwd=HOUSE
    )
    assert (done.returncode, done.stderr) == (code, "")


def test_a_stream_of_events_ends_with_its_reader(answering: Any) -> None:
    """As `blyan-node events | head -1`."""
    event = Event(event="block", time=1.0, data={})
    ended = threading.Event()

    async def stream(request: Any, context: Any) -> Any:
        try:
            while True:
                context.notify(event)
                await trio.lowlevel.checkpoint()
        finally:
            ended.set()

    answering.answers["events.subscribe"] = stream
    child = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "events"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 1
    assert ended.wait(60)
