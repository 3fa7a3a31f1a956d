"""The import contracts hold, and each one goes red when a forbidden import appears."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
PACKAGES = ["blyan_node", "cli", "protocols", "storage"]

# The contract's name in setup.cfg, a module, and an import that it must not have.
FORBIDDEN = [
    ("Four floors", "protocols/ids.py", "storage"),
    ("Four floors", "storage/__init__.py", "blyan_node"),
    ("Four floors", "blyan_node/__init__.py", "cli"),
    ("thin client", "cli/__init__.py", "trio"),
    ("do no I/O", "protocols/dag/header.py", "time"),
    ("no business together", "protocols/experts/__init__.py", "protocols.sync"),
    ("Storage knows no network", "storage/__init__.py", "trio"),
    ("plyvel only", "storage/__init__.py", "plyvel"),
    ("libp2p and multiaddr only", "blyan_node/__init__.py", "libp2p"),
    ("only in blyan_node.moe", "blyan_node/__init__.py", "torch"),
    ("only in blyan_node.moe", "blyan_node/moe/numerics.py", "llvmlite"),
    ("huggingface_hub only in the process", "blyan_node/services/__init__.py", "huggingface_hub"),
    ("prometheus_client only", "blyan_node/services/__init__.py", "prometheus_client"),
    ("engine computes", "blyan_node/moe/__init__.py", "trio"),
    ("needs a test tool", "blyan_node/services/__init__.py", "transformers"),
    ("needs a test tool", "blyan_node/network/__init__.py", "blyan_node.testing"),
]


LINT = """
import sys
from importlinter.cli import lint_imports_command

sys.path.insert(0, ".")
lint_imports_command(["--no-cache"])
"""


def _lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs the contracts on the packages in `folder`, which come before the installed ones."""
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages and of setup.cfg."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copy(HOUSE / "setup.cfg", copy)
    for package in PACKAGES:
        shutil.copytree(HOUSE / package, copy / package, ignore=shutil.ignore_patterns("*.pyc"))
    return copy


def test_the_contracts_hold(tree: Path) -> None:
    done = _lint(tree)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("contract", "module", "imported"), FORBIDDEN)
def test_a_forbidden_import_goes_red(tree: Path, contract: str, module: str, imported: str) -> None:
    path = tree / module
    clean = path.read_text()
    path.write_text(f"{clean}\nimport {imported}  # the forbidden one\n")
    try:
        done = _lint(tree)
    finally:
        path.write_text(clean)
    assert done.returncode == 1, done.stderr
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(contract in line for line in broken), done.stdout
