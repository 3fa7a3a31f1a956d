"""Completion as a person has it: in the real shells, on a terminal, with and without a node."""

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.completion import SHELLS, VARIABLE, script
from cli.main import COMMANDS, root
from cli.values import models
from protocols.rpc import expert, model

SAYS_S_MAX = 30
ID = "bafk" + "a" * 40
TAB = "\t"


def _model(name: str, id: str) -> model.ModelInfo:
    return model.ModelInfo(
        name=name, model=id, author="12D3", family="mixtral", root="0" * 64,
        experts=2, held=2, bytes=1,
    )  # fmt: skip


def _knows(node: Any) -> None:
    """A node with three models, two of one name, and two experts."""
    listed = [_model("olm", "bafkolm"), _model("two", ID + "b"), _model("two", ID + "c")]
    node.answers["model.list"] = lambda request, context: model.ListResult(models=listed)
    rows = [
        expert.ExpertInfo(subject=f"layer{n}.expert3", block="bafk", holders=[]) for n in (0, 1)
    ]
    node.answers["expert.list"] = lambda request, context: expert.ExpertsResult(experts=rows)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A folder with `blyan-node`, as an installation has it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "blyan-node").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cli.main "$@"\n')
    (folder / "blyan-node").chmod(0o755)
    return folder


def _environment(program: Path, home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("BLYAN")}
    return kept | {
        "PATH": f"{program}:{os.environ['PATH']}",
        "BLYAN_HOME": str(home),
        "HOME": str(program),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TERM": "dumb",
        "PS1": "$ ",
    }


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Shell:
    """An interactive shell on a terminal."""

    def __init__(self, line: list[str], environment: dict[str, str], folder: Path) -> None:
        self._end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            line, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=folder,
            start_new_session=True, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(theirs)
        self._shown = b""

    def types(self, text: str, shows: str) -> str:
        """Presses these keys and waits for what is to be shown; what was shown since then."""
        self._shown = b""
        os.write(self._end, text.encode())
        deadline = time.monotonic() + SAYS_S_MAX
        while shows not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._end], [], [], 1)[0]:
                self._shown += os.read(self._end, 65536)
        return self.shown

    @property
    def shown(self) -> str:
        """What is on the screen, roughly: without the codes that move the cursor."""
        text = self._shown.decode(errors="replace")
        return re.sub(r"\x1b[\[\]>=(][0-9;?]*[ -~]?|[\r\x07\x08]", "", text)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


_LINES = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}


@pytest.fixture
def bash(program: Path, node: Any, tmp_path: Path) -> Iterator[Shell]:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    _knows(node)
    shell = Shell(_LINES["bash"], _environment(program, node.path.parent), tmp_path)
    shell.types('eval "$(blyan-node completion bash)"; echo do""ne\n', "done")
    yield shell
    shell.end()


def test_bash_completes_commands_options_and_what_the_node_knows(bash: Shell) -> None:
    bash.types("blyan-node mod" + TAB, "model ")
    bash.types("ver" + TAB, "verify ")
    bash.types("ol" + TAB, "olm ")
    bash.types("\x15blyan-node generate --mo" + TAB, "--model ")
    bash.types("ol" + TAB, "olm ")
    bash.types("--tem" + TAB, "--temperature ")
    bash.types("\x15blyan-node generate --model=o" + TAB, "--model=olm ")
    bash.types("\x15blyan-node expert hold layer1" + TAB, "layer1.expert3 ")
    bash.types("lay" + TAB, "layer0.expert3 ")  # the one that is not there yet
    bash.types("\x15blyan-node rpc chain.gr" + TAB, "chain.graph ")


def test_bash_completes_a_name_with_an_id(bash: Shell) -> None:
    bash.types("blyan-node model show tw" + TAB, f"two@{ID}")
    bash.types("c" + TAB, "c ")
    assert "two@two@" not in bash.types('x\x15echo do""ne\n', "done")


def test_bash_completes_files_where_files_are_meant(bash: Shell, tmp_path: Path) -> None:
    (tmp_path / "genesis.json").write_text("{}")
    for line in (
        "model update olm --weights",
        "init --network",
        "start --psk",
        "network new --out",
    ):
        bash.types(f"\x15blyan-node {line} gene" + TAB, "genesis.json ")


def _replies(program: Path, home: Path, line: str) -> list[str]:
    """What bash would insert for a line, without a terminal."""
    words = 'complete -p blyan-node >&2; printf "%s\\n" "${COMPREPLY[@]}"'
    asked = (
        f'eval "$(blyan-node completion bash)"; COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}};'
        f" _blyan_node_completion blyan-node; {words}"
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", asked], env=_environment(program, home),
        capture_output=True, text=True, timeout=SAYS_S_MAX, check=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_without_a_node_only_live_values_are_missing(program: Path, tmp_path: Path) -> None:
    assert _replies(program, tmp_path, "blyan-node model show ") == []
    assert _replies(program, tmp_path, "blyan-node status extra ") == []
    assert "show" in _replies(program, tmp_path, "blyan-node model ")
    assert set(_replies(program, tmp_path, "blyan-node ")) == set(COMMANDS)
    assert _replies(program, tmp_path, "blyan-node init --role ") == ["main", "gpu"]
    assert _replies(program, tmp_path, "blyan-node start --device c") == ["cpu", "cuda"]
    assert _replies(program, tmp_path, "blyan-node 'half a quo") == []


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_complete_too(
    shell: str, program: Path, node: Any, tmp_path: Path
) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    _knows(node)
    opened = Shell(_LINES[shell], _environment(program, node.path.parent), tmp_path)
    try:
        if shell == "zsh":
            setup = "PS1='$ '; autoload -Uz compinit; compinit -u -D; "
            setup += 'eval "$(blyan-node completion zsh)"; '
        else:
            setup = "blyan-node completion fish | source; "
        opened.types(setup + 'echo do""ne\n', "done")
        opened.types("blyan-node mod" + TAB, "model ")
        opened.types("ver" + TAB, "verify ")
        opened.types("ol" + TAB, "olm ")
    finally:
        opened.end()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_printed_for_each_shell(shell: str, command: Callable[..., Any]) -> None:
    said = command("completion", shell)
    assert said.code == 0
    assert said.out == script(shell, root)
    assert VARIABLE in said.out and "blyan-node" in said.out
    assert command("completion", shell, "--json").json == {"shell": shell, "script": said.out}


def test_a_shell_that_is_not_known_is_wrong_usage(command: Callable[..., Any]) -> None:
    said = command("completion", "tcsh")
    assert said.code == 3
    assert "bash" in said.err


def test_names_that_a_shell_could_take_for_something_else_are_not_offered(
    node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [_model(name, "bafk") for name in ("good", "$(touch x)", "a b", "x\n", "`x`", "")]
    node.answers["model.list"] = lambda request, context: model.ListResult(models=listed)
    monkeypatch.setenv("BLYAN_HOME", str(node.path.parent))
    context = root.make_context("blyan-node", [], resilient_parsing=True)
    found = models(context, root.params[0], "")
    assert [item.value for item in found] == ["good"]


def test_a_node_that_says_nothing_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    path = tmp_path / "rpc.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(path))
        mute.listen()
        monkeypatch.setenv("BLYAN_RPC", str(path))
        context = root.make_context("blyan-node", [], resilient_parsing=True)
        assert models(context, root.params[0], "") == []
