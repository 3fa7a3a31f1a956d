"""What README.md tells a person to type exists."""

import re
import tomllib
from pathlib import Path

HOUSE = Path(__file__).parents[2]


def test_every_make_command_of_the_documents_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (HOUSE / "Makefile").read_text(), re.MULTILINE))
    for path in [HOUSE / "README.md", *(HOUSE / "docs").rglob("*.md")]:
        for name in re.findall(r"(?:^|`)(?:\$ )?make ([a-z]+)", path.read_text(), re.MULTILINE):
            assert name in targets, f"{path.name}: make {name}"


def test_readme_shows_the_two_commands_first() -> None:
    readme = (HOUSE / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def test_every_relative_link_of_the_documents_leads_somewhere() -> None:
    for path in [HOUSE / "README.md", *(HOUSE / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_continuous_integration_runs_what_a_person_runs() -> None:
    assert "exec make test" in (HOUSE / ".ci" / "run").read_text()
    assert (HOUSE / ".ci" / "run").stat().st_mode & 0o111


def test_the_command_is_installed_by_the_package() -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"blyan-node": "cli.main:main"}
