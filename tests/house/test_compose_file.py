"""The Dockerfile and the compose file, as far as they can be checked without Docker's engine.

Not checked here: that the base image and the index of torch have what is named, the sizes, and what
only an engine does (building, memory limits, restarts, log rotation).
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from blyan_node.config_file import config_text, read_settings
from blyan_node.testing.compose import Compose, in_order, read_compose, read_dockerfile, the
from cli.main import root

HOUSE = Path(__file__).parents[2]
NODES = ("bootstrap", "alice", "bob", "carol", "dave")
PEER = "12D3KooWDvadU48PARTJNYQ8tv4Dc7rQxWu2Q54dspnu5cWEJgr5"
STEPS = read_dockerfile(HOUSE / "Dockerfile")
PREPARE = HOUSE / "packaging" / "compose" / "prepare.py"


@pytest.fixture
def compose() -> Compose:
    return read_compose(HOUSE / "docker-compose.yml", {})


def test_one_main_three_gpu_nodes_and_a_bootstrap_node(compose: Compose) -> None:
    assert {*compose.services} == {*NODES, "prepare", "model"}
    _, *roles = compose.services["prepare"].command or []
    assert roles == ["bootstrap=gpu", "alice=main", "bob=gpu", "carol=gpu", "dave=gpu"]
    assert "none" in (compose.services["bootstrap"].command or [])


def test_nodes_start_once_there_are_identities_and_a_bootstrap_node(compose: Compose) -> None:
    assert in_order(compose.services)[0] == "prepare"
    for name in NODES:
        waits = {key: on.condition for key, on in compose.services[name].depends_on.items()}
        others = {} if name == "bootstrap" else {"bootstrap": "service_healthy"}
        assert waits == {"prepare": "service_completed_successfully"} | others


def test_each_node_sees_its_own_home_alone(compose: Compose) -> None:
    for name in NODES:
        homes = [m for m in compose.services[name].volumes if "homes" in m.source]
        assert [(m.source, m.target) for m in homes] == [
            (f"./packaging/compose/homes/{name}", "/var/lib/blyan")
        ]


def test_nodes_may_do_little_and_end_in_peace(compose: Compose) -> None:
    for name in NODES:
        service = compose.services[name]
        assert service.user == "1000:1000" and service.cap_drop == ["ALL"] and service.read_only
        assert service.restart == "unless-stopped" and service.mem_limit
        assert int((service.stop_grace_period or "0s").removesuffix("s")) > 10


def test_variables_say_whose_and_where_things_are() -> None:
    given = {"BLYAN_UID": "7", "BLYAN_GID": "8", "BLYAN_HOMES": "/h", "TORCH_INDEX": ""}
    alice = read_compose(HOUSE / "docker-compose.yml", given).services["alice"]
    assert alice.user == "7:8" and alice.volumes[0].source == "/h/alice"
    assert alice.build.args == {"TORCH_INDEX": ""}


def test_whatever_is_mounted_is_in_the_repository(compose: Compose) -> None:
    """With `create_host_path` the engine would make it, as root's."""
    kept = _kept_files()
    for service in compose.services.values():
        for mount in service.volumes:
            assert not mount.bind.create_host_path
            assert [path for path in kept if f"./{path}/".startswith(f"{mount.source}/")], mount


def test_nothing_that_a_node_writes_can_be_committed() -> None:
    secret = "packaging/compose/homes/alice/identity.key"
    done = _git("check-ignore", secret, "packaging/compose/models/smollm2/config.json")
    assert secret in done.stdout and "config.json" in done.stdout


@pytest.mark.parametrize(
    "change",
    [
        {"port": ["4040"]},
        {"restart": "sometimes"},
        {"mem_limit": "much"},
        {"depends_on": {"prepare": {"condition": "service_well"}}},
        {"stop_grace_period": 15},
    ],
)
def test_a_wrong_field_is_found(change: dict[str, Any], tmp_path: Path) -> None:
    document = yaml.safe_load((HOUSE / "docker-compose.yml").read_text())
    document["services"]["alice"] |= change
    (tmp_path / "changed.yml").write_text(yaml.safe_dump(document))
    with pytest.raises(msgspec.ValidationError, match=next(iter(change))):
        read_compose(tmp_path / "changed.yml", {})


def test_the_compose_client_reads_it_alike(compose: Compose) -> None:
    client = _compose_client()
    line = [*client, "--file", str(HOUSE / "docker-compose.yml"), "--profile", "*", "config"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("BLYAN", "TORCH"))}
    done = subprocess.run(
        [*line, "--format", "json"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    services = json.loads(done.stdout)["services"]
    assert services.keys() == compose.services.keys()
    for name, service in compose.services.items():
        assert services[name]["command"] == service.command or service.command is None
        assert services[name]["user"] == service.user
        assert {
            on: how["condition"] for on, how in services[name].get("depends_on", {}).items()
        } == {on: how.condition for on, how in service.depends_on.items()}


def _compose_client() -> list[str]:
    for client in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(client[0]):
            done = subprocess.run([*client, "version"], capture_output=True, check=False)
            if done.returncode == 0:
                return client
    pytest.skip("there is no compose client (neither `docker compose` nor `docker-compose`)")


def test_every_copied_path_exists_and_reaches_the_builder() -> None:
    let_in = re.findall(r"^!(.+)$", (HOUSE / ".dockerignore").read_text(), re.MULTILINE)
    copied = [
        path for step in STEPS if step.word == "COPY" and "--from" not in step.rest
        for path in step.words[:-1]
    ]  # fmt: skip
    assert sorted(copied) == sorted(let_in)
    assert [path for path in copied if not (HOUSE / path).exists()] == []


def test_the_image_has_every_package_of_ours() -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())
    packages = {name.removesuffix("*") for name in _packages(project)}
    copied = {step.words[0] for step in STEPS if step.word == "COPY" and step.stage == "build"}
    assert packages <= copied
    for needed in (project["project"]["readme"], *project["project"]["license-files"]):
        assert any(needed in step.words for step in STEPS if step.word == "COPY")


def _packages(project: dict[str, Any]) -> list[str]:
    found: list[str] = project["tool"]["setuptools"]["packages"]["find"]["include"]
    return found


def test_the_image_installs_at_our_pins_as_the_environment_does() -> None:
    pips = [step.rest for step in STEPS if step.word == "RUN" and "/bin/pip" in step.rest]
    assert len(pips) == 3
    assert all("--constraint constraints.txt" in pip for pip in pips)
    ours = (HOUSE / "tools" / "environment.sh").read_text()
    assert "--constraint constraints.txt" in ours
    compiles_with = {"gcc", "libc6-dev", "libgmp-dev"}
    assert all(package in ours for package in compiles_with)
    (apt,) = [s for s in STEPS if s.stage == "build" and s.word == "RUN" and "apt-get" in s.rest]
    assert compiles_with <= {*apt.words}


def test_the_base_is_one_release_of_a_python_that_we_support() -> None:
    (python,) = [step.rest for step in STEPS if step.stage == "" and step.word == "ARG"]
    assert re.fullmatch(r"PYTHON=3\.1[1-9]\.\d+-slim-[a-z]+", python)
    froms = [step.words[0] for step in STEPS if step.word == "FROM"]
    assert froms == ["python:${PYTHON}", "build", "python:${PYTHON}"]


def test_the_last_stage_is_the_node_and_runs_as_nobody() -> None:
    assert STEPS[-1].stage == "node"
    assert the(STEPS, "node", "USER").rest == "1000:1000"
    assert "gcc" not in " ".join(step.rest for step in STEPS if step.stage == "node")


def test_the_image_runs_commands_that_there_are(compose: Compose) -> None:
    assert the(STEPS, "node", "ENTRYPOINT").words == ["blyan-node"]
    check = the(STEPS, "node", "HEALTHCHECK").rest.partition("CMD ")[2]
    assert check == "blyan-node status || exit 1"
    lines = [the(STEPS, "node", "CMD").words]
    lines += [compose.services[name].command or [] for name in NODES]
    for line in lines:
        command = root.get_command(None, line[0])  # type: ignore[arg-type]
        assert command is not None and line[0] == "start"
        options = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in line if word.startswith("--")} <= options


def test_prepare_makes_homes_that_find_each_other_and_keeps_them(tmp_path: Path) -> None:
    for name in NODES:
        (tmp_path / name).mkdir()
    roles = ["bootstrap=gpu", "alice=main", "bob=gpu", "carol=gpu", "dave=gpu"]
    _prepare(tmp_path, *roles)
    made = _content(tmp_path)
    networks = {(tmp_path / name / "network.json").read_text() for name in NODES}
    assert networks == {(tmp_path / "network.json").read_text()}
    assert len({(tmp_path / name / "identity.key").read_text() for name in NODES}) == len(NODES)
    alice = read_settings((tmp_path / "alice" / "config.toml").read_bytes())
    assert alice.role == "main" and alice.bootstrap is not None
    assert alice.bootstrap[0].startswith("/dns4/bootstrap/tcp/4040/p2p/12D3KooW")
    assert read_settings((tmp_path / "bootstrap" / "config.toml").read_bytes()).bootstrap is None

    _prepare(tmp_path, *roles)
    assert _content(tmp_path) == made


def test_prepare_mends_what_was_cut_off_and_what_went_stale(tmp_path: Path) -> None:
    _prepare(tmp_path, "bootstrap=gpu", "alice=main")
    config = tmp_path / "alice" / "config.toml"
    (stale,) = read_settings(config.read_bytes()).bootstrap or []
    written = config.read_text().replace(f'["{stale}"]', f'["{stale[:-52]}{PEER}", "{stale}"]')
    config.write_text("# mine\n" + written.replace("/bootstrap/", "/elsewhere/", 1))
    shutil.rmtree(tmp_path / "bootstrap")
    (tmp_path / "network.json").unlink()
    _prepare(tmp_path, "bootstrap=gpu", "alice=main", "bob=gpu")
    addresses = read_settings(config.read_bytes()).bootstrap or []
    assert len(addresses) == 2 and stale not in addresses
    assert addresses[0] == f"/dns4/elsewhere/tcp/4040/p2p/{PEER}"
    assert config.read_text().startswith("# mine\n")
    networks = {path.read_text() for path in tmp_path.glob("**/network.json")}
    assert len(networks) == 1

    (tmp_path / "bob" / "identity.key").unlink()
    told = _prepare(tmp_path, "bootstrap=gpu", "alice=main", "bob=gpu", code=1)
    assert "never overwrites a key or a configuration" in told
    (tmp_path / "bob" / "config.toml").write_text(config_text("gpu"))  # as a cut-off run leaves it
    _prepare(tmp_path, "bootstrap=gpu", "alice=main", "bob=gpu")
    assert (tmp_path / "bob" / "identity.key").exists()


def test_prepare_says_what_is_wrong(tmp_path: Path) -> None:
    assert "NAME=gpu" in _prepare(tmp_path, "alice=boss", code=1)
    _prepare(tmp_path, "bootstrap=gpu", "alice=main")
    (tmp_path / "bootstrap" / "identity.key").chmod(0o644)
    assert "is not private" in _prepare(tmp_path, "bootstrap=gpu", "alice=main", code=1)


def test_prepare_says_whose_folder_it_cannot_write(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = runpy.run_path(str(PREPARE))["main"]

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/homes/network.json.new")

    monkeypatch.setitem(main.__globals__, "write_whole", refuse)
    assert main([str(tmp_path), "bootstrap=gpu"]) == 1
    assert "BLYAN_UID=$(id -u)" in capsys.readouterr().err


def _prepare(folder: Path, *roles: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(PREPARE), str(folder), *roles],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def _content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("git") is None or not (HOUSE / ".git").exists():
        pytest.skip("this is no git checkout")
    line = ["git", "-C", str(HOUSE), *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def _kept_files() -> list[str]:
    """What a clone has: tracked, or new and not ignored."""
    return _git("ls-files", "--cached", "--others", "--exclude-standard").stdout.splitlines()
