"""The pins and ranges say the same, and torch is pinned for every index alike."""

import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOUSE = Path(__file__).parents[2]


def _pins() -> dict[str, Requirement]:
    lines = (HOUSE / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_torch_is_pinned_without_a_local_version() -> None:
    assert "torch==2.13.0" in (HOUSE / "constraints.txt").read_text().splitlines()


def test_every_range_has_a_pin_inside_it() -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [Requirement(line) for group in (project["dependencies"], *extras) for line in group]
    pins = _pins()
    for requirement in wanted:
        if requirement.name != "blyan-node":
            (pin,) = pins[canonicalize_name(requirement.name)].specifier
            assert pin.operator == "==", pin
            assert requirement.specifier.contains(pin.version), requirement


def test_everything_installed_is_pinned() -> None:
    tools = {"blyan-node", "pip", "setuptools", "wheel"}
    installed = {canonicalize_name(item.name) for item in distributions()}
    assert installed - tools - set(_pins()) == set()
