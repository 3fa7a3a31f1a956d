"""The steps of the image's first stage, in an empty folder and an empty environment.

What needs a network or root is left out: apt-get, and the packages of others, which are this
environment's. So it shows that what the Dockerfile copies is enough to build, install and run the
node, and that nothing of it comes from the checkout.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from blyan_node.testing.compose import Step, read_dockerfile, the

HOUSE = Path(__file__).parents[2]
STEPS = read_dockerfile(HOUSE / "Dockerfile")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LEFT_OUT = ("apt-get",)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which there are /src and /opt/blyan, as after the stage `build`."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "src").mkdir()
    for step in (step for step in STEPS if step.stage == "build"):
        if step.word == "COPY":
            _copy(step, folder / "src")
        elif step.word == "RUN" and not any(word in step.rest for word in LEFT_OUT):
            _run(_here(step.rest, folder), folder / "src")
            _lend(folder / "opt" / "blyan")
    return folder


def _copy(step: Step, to: Path) -> None:
    *sources, target = step.words
    for source in sources:
        path = HOUSE / source
        if path.is_dir():
            shutil.copytree(path, to / target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, to / target)


def _here(line: str, folder: Path) -> str:
    """The step with our Python and pip, at our path, without the packages of others."""
    line = line.replace("python -m venv", f"{sys.executable} -m venv --without-pip")
    line = line.replace(
        "/opt/blyan/bin/pip", f"{sys.executable} -m pip --python {folder}/opt/blyan"
    )
    line = line.replace("pip install", "pip install --no-deps --no-build-isolation")
    return re.sub(r"(?<![\w/])/opt/blyan", f"{folder}/opt/blyan", line)


def _run(line: str, where: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "HOME": str(where), "BLYAN_COMMIT": COMMIT}
    done = subprocess.run(
        ["sh", "-c", line], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def _lend(environment: Path) -> None:
    """Has the new environment see the packages of ours, though not those of this checkout."""
    (site,) = environment.glob("lib/python3.*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")


def _as_the_image(image: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs `words` as the last stage would: its PATH, its home, nothing of the checkout's."""
    pairs = dict(word.split("=", 1) for word in the(STEPS, "node", "ENV").words)
    home = image / "home"
    home.mkdir(exist_ok=True)
    path = pairs["PATH"].replace("/opt/blyan", f"{image}/opt/blyan")
    environment = {**pairs, "PATH": path, "BLYAN_HOME": str(home), "HOME": str(home)}
    return subprocess.run(
        [*words], cwd=home, env=environment, capture_output=True, text=True, check=False
    )


def test_what_is_copied_is_enough_to_install_and_run_the_node(image: Path) -> None:
    program = f"{image}/opt/blyan/bin/blyan-node"
    said = _as_the_image(image, program, "--version")
    assert said.returncode == 0, said.stderr
    assert COMMIT[:7] in said.stdout
    where = _as_the_image(
        image, f"{image}/opt/blyan/bin/python", "-c",
        "import blyan_node, cli, protocols, storage\n"
        "print(*(m.__file__ for m in (blyan_node, cli, protocols, storage)))",
    )  # fmt: skip
    assert where.returncode == 0, where.stderr
    assert all(path.startswith(f"{image}/opt/blyan/") for path in where.stdout.split())


def test_the_health_check_fails_by_the_number_that_docker_expects(image: Path) -> None:
    check = the(STEPS, "node", "HEALTHCHECK").rest.partition("CMD ")[2]
    assert _as_the_image(image, "/bin/sh", "-c", check).returncode == 1
