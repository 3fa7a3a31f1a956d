"""What a compose file and a Dockerfile say, read strictly: any field that is not here is an error.

The structs are the part of the Compose Specification that this project uses, with the values that
it allows. Variables are filled in as compose does it, in every text after the YAML has been read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml

Text = Annotated[str, msgspec.Meta(min_length=1)]
Duration = Annotated[str, msgspec.Meta(pattern=r"^(\d+(us|ms|s|m|h))+$")]
Bytes = Annotated[str, msgspec.Meta(pattern=r"^\d+(b|k|kb|m|mb|g|gb)$")]
User = Annotated[str, msgspec.Meta(pattern=r"^\d+:\d+$")]
Absolute = Annotated[str, msgspec.Meta(pattern=r"^/")]
_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?:(:?-)([^}]*))?\}|)")


class Strict(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """A mapping with known keys."""


class Build(Strict, frozen=True):
    """How to build the image."""

    context: Text
    target: Text
    args: dict[str, str] = {}


class Bind(Strict, frozen=True):
    """What to do when the host has no such path."""

    create_host_path: bool


class Mount(Strict, frozen=True):
    """A path of the host in the container."""

    type: Literal["bind"]
    source: Text
    target: Absolute
    bind: Bind
    read_only: bool = False


class Dependency(Strict, frozen=True):
    """What must be true of another service before this one starts."""

    condition: Literal["service_started", "service_healthy", "service_completed_successfully"]


class Healthcheck(Strict, frozen=True):
    """Only to switch off the image's."""

    disable: Literal[True]


class Logging(Strict, frozen=True):
    """Where what it says goes."""

    driver: Literal["json-file"]
    options: dict[str, str]


class Service(Strict, frozen=True):
    """One service."""

    image: Text
    build: Build
    user: User
    restart: Literal["no", "unless-stopped"]
    volumes: list[Mount]
    command: list[str] | None = None
    entrypoint: list[str] | None = None
    depends_on: dict[str, Dependency] = {}
    healthcheck: Healthcheck | None = None
    profiles: list[str] = []
    init: bool = False
    read_only: bool = False
    tmpfs: list[Absolute] = []
    cap_drop: list[str] = []
    security_opt: list[str] = []
    logging: Logging | None = None
    stop_grace_period: Duration | None = None
    mem_limit: Bytes | None = None


class Compose(Strict, frozen=True):
    """A compose file."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    services: dict[Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9._-]+$")], Service]


def read_compose(path: Path, variables: Mapping[str, str]) -> Compose:
    """Reads a compose file; raises `msgspec.ValidationError` naming what is wrong with it."""
    document = yaml.safe_load(path.read_text())
    plain = {key: value for key, value in document.items() if not key.startswith("x-")}
    return msgspec.convert(_filled(plain, variables), Compose)


def in_order(services: Mapping[str, Service]) -> list[str]:
    """The services' names, each after those that it depends on."""
    order: list[str] = []
    while left := [name for name in services if name not in order]:
        free = [name for name in left if services[name].depends_on.keys() <= {*order}]
        if not free:
            raise ValueError(f"{', '.join(left)} wait for each other, or for nobody")
        order += free
    return order


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, variables) for item in value]
    return _VARIABLE.sub(lambda m: _value(m, variables), value) if isinstance(value, str) else value


def _value(match: re.Match[str], variables: Mapping[str, str]) -> str:
    name, kind, default = match.groups()
    if match[0] == "$$":
        return "$"
    if name is None:
        raise ValueError(f"a lone $ in {match.string!r}")
    if name in variables and (variables[name] or kind == "-"):
        return variables[name]
    if kind is None:
        raise ValueError(f"{name} has no default")
    return default


@dataclass(frozen=True)
class Step:
    """One instruction of a Dockerfile, in the stage that it belongs to."""

    stage: str
    word: str
    rest: str

    @property
    def words(self) -> list[str]:
        """What follows, as a JSON list where it is one, else as words."""
        found: list[str] = (
            msgspec.json.decode(self.rest) if self.rest.startswith("[") else self.rest.split()
        )
        return found


def read_dockerfile(path: Path) -> list[Step]:
    """The instructions in their order; those before the first FROM are in the stage ""."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    steps, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        if word:
            steps.append(Step(stage, word, rest.strip()))
    return steps


def the(steps: list[Step], stage: str, word: str) -> Step:
    """The last instruction `word` of a stage, which is the one that counts."""
    return [step for step in steps if (step.stage, step.word) == (stage, word)][-1]
