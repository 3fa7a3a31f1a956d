"""`--version`: the command's own and the node's, with commits; runs no git and loads no torch."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocols import build
from protocols.rpc import node as messages

HOUSE = Path(__file__).parents[2]
ONE, TWO = "1" * 40, "2" * 40
STATUS = messages.StatusResult(
    peer_id="12D3", role="main", network="bafk", version="9.8.7", commit=TWO, addrs=[], peers=0,
    blocks=0, models=0, held=messages.Held(experts=0, bytes=0), stored_bytes=0, syncing=None,
    profile="cpu-f32", precision="as-published",
)  # fmt: skip


def test_a_node_that_runs_says_its_own(node: Any, command: Callable[..., Any]) -> None:
    node.answers["node.status"] = lambda request, context: STATUS
    said = command("--version")
    assert said.code == 0
    first, second, third = said.out.splitlines()
    assert first.startswith(f"blyan-node {importlib.metadata.version('blyan-node')}")
    assert second == f"node: 9.8.7 (commit {TWO[:12]})"
    assert third == "profile: cpu-f32"
    document = command("--version", "--json").json
    assert document["node"] == {"version": "9.8.7", "commit": TWO, "profile": "cpu-f32"}
    assert document == command("--json", "--version").json


def test_without_a_node_the_profile_is_left_out_and_it_is_said_why(
    command: Callable[..., Any],
) -> None:
    said = command("--version")
    assert said.code == 0 and said.err == ""
    assert "none answers on" in said.out and "numeric profile" in said.out
    assert command("--version", "--json").json["node"] is None


@pytest.mark.skipif(not (HOUSE / ".git").exists(), reason="this is no checkout")
def test_in_a_checkout_it_is_the_commit_that_is_checked_out(command: Callable[..., Any]) -> None:
    head = subprocess.run(
        ["git", "-C", str(HOUSE), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert command("--version", "--json").json["commit"] == head


def test_it_needs_no_git_no_torch_and_no_network_stack(tmp_path: Path) -> None:
    code = (
        "import sys; from cli.main import run; assert run(['--version']) == 0;"
        "assert not {'torch', 'libp2p', 'subprocess'} & set(sys.modules), sorted(sys.modules)"
    )
    environment = {**os.environ, "PATH": "", "BLYAN_HOME": str(tmp_path), "PYTHONPATH": str(HOUSE)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)


def _read(files: dict[str, str]) -> Callable[[str], str | None]:
    return lambda path: files.get(path)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({".git/HEAD": f"{ONE}\n"}, ONE),
        ({".git/HEAD": "ref: refs/heads/main\n", ".git/refs/heads/main": f"{ONE}\n"}, ONE),
        ({".git/HEAD": "ref: refs/heads/main\n"}, None),
        (
            {".git/HEAD": "ref: refs/heads/a\n",
             ".git/packed-refs": f"# pack-refs\n{TWO} refs/heads/ab\n{ONE} refs/heads/a\n^{TWO}\n"},
            ONE,
        ),
        (
            {".git": "gitdir: /r/.git/worktrees/w\n", "/r/.git/worktrees/w/commondir": "../..\n",
             "/r/.git/worktrees/w/HEAD": "ref: refs/heads/w\n",
             "/r/.git/worktrees/w/../../refs/heads/w": ONE},
            ONE,
        ),
        ({".git/HEAD": "nonsense"}, None),
        ({".git/HEAD": "ref: refs/heads/main", ".git/refs/heads/main": "zz"}, None),
        ({build.COMMIT_FILE: TWO, ".git/HEAD": ONE}, TWO),
    ],
)  # fmt: skip
def test_a_commit_is_read_from_files(files: dict[str, str], found: str | None) -> None:
    assert build.commit(_read(files), None) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f'{{"url": "https://x.org/x", "vcs_info": {{"vcs": "git", "commit_id": "{ONE}"}}}}', ONE),
        ('{"url": "file:///src", "dir_info": {"editable": true}}', None),
        ("[]", None),
        ("[" * 100_000, None),
        ("{", None),
        (None, None),
    ],
)  # fmt: skip
def test_a_commit_is_read_from_the_metadata_of_an_installation(
    text: str | None, found: str | None
) -> None:
    assert build.commit(_read({}), text) == found


def test_a_build_leaves_its_commit_in_the_package(tmp_path: Path) -> None:
    out = tmp_path / "build"
    line = [sys.executable, "setup.py", "-q", "build", "--build-base", str(out)]
    environment = {**os.environ, "BLYAN_COMMIT": TWO, "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(line, cwd=HOUSE, check=True, capture_output=True, env=environment, timeout=120)
    (library,) = out.glob("lib*")
    assert build.commit(lambda path: (library / path).read_text(), None) == TWO
