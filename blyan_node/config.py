"""The node's configuration: made once at the edge, checked when made, the same for all services.

Three layers, later ones win: the defaults of the role, `config.toml` in the node's home, what the
command line says. Whatever is wrong raises `RemoteProtocolError` whose `where` names its place in
the file ("config.toml line 7, column 11"), the option ("--memory") or the variable.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from blyan_node.config_file import Written
from blyan_node.log_areas import LogLevels, parse_log_levels
from blyan_node.metrics.address import MetricsAddress
from blyan_node.settings import (
    Hold,
    Kernels,
    Role,
    Settings,
    check_endpoint,
    parse_hold,
    parse_metrics,
    parse_peers,
)
from blyan_node.sizes import free_memory_bytes, parse_size
from protocols.dag.genesis import DEVELOPMENT, Genesis
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.precision import PUBLISHED, Precision
from protocols.rpc.address import socket_path

GENESIS_FILE = "network.json"
KEY_FILE = "identity.key"
PSK_FILE = "swarm.key"
DATA_FOLDER = "data"
DOWNLOADS_FOLDER = "downloads"

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/4040",)
DEFAULT_HOLD: Mapping[Role, str] = {"main": "none", "gpu": "auto"}
HUB_ENDPOINT = "https://huggingface.co"
ENDPOINT_VARIABLE = "HF_ENDPOINT"

FIELDS: Mapping[str, str] = {"memory": "memory_bytes", "disk": "disk_bytes"}
"""The fields of `Config` that have other names than their keys."""

Source = Literal["default", "file", "environment", "option"]


@dataclass(frozen=True)
class Origin:
    """A setting as it was given: by whom, and on which line of `config.toml`."""

    value: str | int | list[str] | None
    source: Source
    line: int | None = None


@dataclass(frozen=True)
class Config:
    """Everything that a node can be told.

    `hold` names experts of whichever model has them; `memory_bytes` is what weights and caches may
    take, `disk_bytes` what the store may (None: no bound), `authors` whose models a gpu node takes
    by itself ("all", or peer ids), `hub_endpoint` is where `hf:` models come from, `psk` the
    file of a private swarm's key, `allowed_peers` who may take part ("all", or peer ids).
    `metrics` is where Prometheus may read (None: nowhere), `device` and `kernels` what computes
    (`blyan_node.moe.arithmetic`), `precision` that in which matrices are held. `origins` has, by
    key, the value as it was given and where it came from.
    """

    home: Path
    genesis: Genesis
    rpc: Path
    role: Role
    listen: tuple[str, ...]
    announce: tuple[str, ...]
    bootstrap: tuple[str, ...]
    hold: Hold
    memory_bytes: int
    disk_bytes: int | None
    threads: int
    replicas: int
    authors: Literal["all"] | tuple[PeerId, ...]
    hub_endpoint: str = HUB_ENDPOINT
    psk: Path | None = None
    allowed_peers: Literal["all"] | tuple[PeerId, ...] = "all"
    metrics: MetricsAddress | None = None
    log_level: LogLevels = field(default_factory=LogLevels)
    device: str = "auto"
    kernels: Kernels = "auto"
    precision: Precision = PUBLISHED
    origins: Mapping[str, "Origin"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def downloads(self) -> Path:
        """The folder of what comes from the hub, until it is published."""
        return self.home / DOWNLOADS_FOLDER

    @property
    def data(self) -> Path:
        """The folder of the store."""
        return self.home / DATA_FOLDER

    @property
    def key_file(self) -> Path:
        """The file of the node's secret seed."""
        return self.home / KEY_FILE


def make_config(
    home: Path, genesis: Genesis, rpc: Path | None, file: Written, options: Settings
) -> Config:
    """The configuration of a node at `home` from its file and the command line's options."""
    origins: dict[str, Origin] = {}

    def chosen(key: str, default: Any, source: Source = "default") -> Any:
        option, written = getattr(options, key), getattr(file.settings, key)
        if option is not None:
            origins[key] = Origin(option, "option")
        elif written is not None:
            origins[key] = Origin(written, "file", file.lines.get(key))
        else:
            origins[key] = Origin(default, source)
        return origins[key].value

    role: Role = chosen("role", "main")
    disk, swarm_key = chosen("disk", None), chosen("psk", _own_key(home))
    return Config(
        home=home,
        genesis=genesis,
        rpc=rpc or Path(socket_path(str(home), os.getuid())),
        role=role,
        listen=tuple(chosen("listen", list(DEFAULT_LISTEN))),
        announce=tuple(chosen("announce", [])),
        bootstrap=tuple(chosen("bootstrap", [])),
        hold=parse_hold(chosen("hold", DEFAULT_HOLD[role])),
        memory_bytes=parse_size(chosen("memory", _half_of_free_memory())),
        disk_bytes=None if disk is None else parse_size(disk),
        threads=chosen("threads", _cores()),
        replicas=chosen("replicas", 2),
        authors=parse_peers(chosen("authors", [] if genesis == DEVELOPMENT else "all")),
        hub_endpoint=chosen("hub_endpoint", *_default_endpoint()).rstrip("/"),
        psk=None if swarm_key is None else home / swarm_key,
        allowed_peers=parse_peers(chosen("allowed_peers", "all")),
        metrics=parse_metrics(chosen("metrics", "off")),
        log_level=parse_log_levels(chosen("log_level", "info")),
        device=chosen("device", "auto"),
        kernels=chosen("kernels", "auto"),
        precision=chosen("precision", PUBLISHED),
        origins=origins,
    )


def _own_key(home: Path) -> str | None:
    """The home's own key of a private swarm, if it is there."""
    return PSK_FILE if (home / PSK_FILE).exists() else None


@cache
def _half_of_free_memory() -> int:
    """As it is when the process starts: what the node itself takes later is no reason for less."""
    return free_memory_bytes() // 2


def _default_endpoint() -> tuple[str, Source]:
    """As the hub's own tools have it: HF_ENDPOINT, or the public hub."""
    endpoint = os.environ.get(ENDPOINT_VARIABLE)
    if not endpoint:
        return HUB_ENDPOINT, "default"
    try:
        check_endpoint(endpoint)
    except RemoteProtocolError as error:
        raise RemoteProtocolError(ENDPOINT_VARIABLE, error.why) from None
    return endpoint, "environment"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
