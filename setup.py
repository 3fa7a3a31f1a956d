"""What a build does besides what pyproject.toml says: a package remembers its commit.

An editable installation is left alone: the checkout that it leads to tells. Where the build sees
no checkout (an image, an archive), BLYAN_COMMIT can name the commit.
"""

import importlib.util
import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def commit() -> str | None:
    """The commit of this folder, as `protocols/build.py` finds it; loaded from there by path."""
    spec = importlib.util.spec_from_file_location("build", HERE / "protocols" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    sys.modules["build"] = build
    spec.loader.exec_module(build)

    def read(path: str) -> str | None:
        try:
            return (HERE / path).read_text()
        except (OSError, ValueError):
            return None

    found: str | None = os.environ.get("BLYAN_COMMIT") or build.commit(read, None)
    return found


class BuildWithCommit(build_py):
    """Copies the modules, and leaves the commit beside them."""

    def run(self) -> None:
        """As ever, and one file more."""
        super().run()
        packages = Path(self.build_lib) / "protocols"
        if not self.editable_mode and packages.is_dir() and (found := commit()) is not None:
            (packages / "commit.txt").write_text(found + "\n")


setup(cmdclass={"build_py": BuildWithCommit})
