"""The man page: current, whole, and without a complaint of those who set it."""

import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from cli.main import root
from cli.manual import page

PAGE = Path(__file__).parents[2] / "packaging" / "man" / "blyan-node.1"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "python -m cli.manual > packaging/man/blyan-node.1"


def _commands(group: click.Group, words: str = "") -> list[tuple[str, click.Command]]:
    found = []
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        inner = isinstance(command, click.Group)
        found += _commands(command, f"{words}{name} ") if inner else [(words + name, command)]  # type: ignore[arg-type]
    return found


def test_every_command_and_option_is_on_it() -> None:
    text = page().replace("\\-", "-")
    for words, command in _commands(root):
        assert re.search(rf"^\.SS {re.escape(words)}\b", text, re.MULTILINE), words
        section = text.partition(f".SS {words}")[2].partition(".SS ")[0]
        for option in command.params:
            if isinstance(option, click.Option) and option.name not in (
                "home", "rpc", "json", "verbose",
            ):  # fmt: skip
                assert option.opts[0] in section, (words, option.opts)
    for variable in ("BLYAN_HOME", "BLYAN_RPC", "NO_COLOR"):
        assert variable in text


def test_its_lines_are_requests_or_plain_text() -> None:
    known = {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".RI", '.\\"'}
    for line in page().splitlines():
        assert line and line == line.rstrip()
        assert line.split()[0] in known if line[0] == "." else line[0] != "'"


@pytest.mark.parametrize(
    "tool",
    [
        ["groff", "-man", "-Tutf8", "-ww"],
        ["mandoc", "-T", "lint", "-W", "warning"],
        ["man", "--warnings", "-l"],
    ],
    ids=lambda tool: tool[0],
)
def test_it_is_set_without_a_complaint(tool: list[str]) -> None:
    if shutil.which(tool[0]) is None:
        pytest.skip(f"{tool[0]} is not installed")
    done = subprocess.run([*tool, str(PAGE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if tool[0] != "mandoc":
        assert "Mixture" in done.stdout
