"""The pins and ranges say the same, and torch is pinned for every index alike."""

import tomllib
from importlib.metadata import requires, version
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


def _needs(name: str, extras: set[str], found: dict[str, str]) -> None:
    """Adds what a distribution and these extras of it need, and what that needs, to `found`."""
    for line in requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            continue
        needed = canonicalize_name(requirement.name)
        if needed not in found and needed != "blyan-node":
            found[needed] = version(needed)
            _needs(needed, requirement.extras, found)


def test_everything_that_we_need_is_here_at_its_pin() -> None:
    needed: dict[str, str] = {}
    _needs("blyan-node", {"demo", "test", "dev"}, needed)
    assert {"torch", "fastecdsa", "pytest"} <= needed.keys()
    pins = _pins()
    for name, installed in needed.items():
        assert name in pins, f"{name} {installed} is not in constraints.txt"
        assert pins[name].specifier.contains(installed), f"{name} {installed} is here"
