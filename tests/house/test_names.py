"""The names of our packages are ours alone in the environment."""

import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
PACKAGES = ["blyan_node", "cli", "protocols", "storage"]


@pytest.mark.parametrize("package", PACKAGES)
def test_only_our_distribution_has_the_package(package: str) -> None:
    assert set(importlib.metadata.packages_distributions()[package]) == {"blyan-node"}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_package_is_the_one_of_this_tree_and_typed(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin == str(HOUSE / package / "__init__.py")
    assert (HOUSE / package / "py.typed").exists()


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for package in PACKAGES for path in (HOUSE / package).rglob("*.py")}
    assert folders
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
