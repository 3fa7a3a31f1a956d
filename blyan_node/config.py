"""The node's configuration: made once at the edge, checked when made, the same for all services.

Three layers, later ones win: the defaults of the role, `config.toml` in the node's home, what the
command line says. Whatever is wrong raises `RemoteProtocolError` whose `where` names the key, for
a file ("config.toml: memory") and for an option ("--memory") alike.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from blyan_node.sizes import free_memory_bytes, parse_size
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT, Genesis
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, Subject, key_of, parse_subject
from protocols.precision import PRECISIONS, PUBLISHED, Precision
from protocols.rpc.address import socket_path

FILE = "config.toml"
GENESIS_FILE = "network.json"
KEY_FILE = "identity.key"
DATA_FOLDER = "data"
DOWNLOADS_FOLDER = "downloads"

Role = Literal["main", "gpu"]
DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/4040",)
DEFAULT_HOLD: Mapping[Role, "Hold"] = {"main": "none", "gpu": "auto"}
ADDRESSES_MAX = 64
HUB_ENDPOINT = "https://huggingface.co"
_HOST = r"(?:ip4/\d{1,3}(?:\.\d{1,3}){3}|ip6/[0-9a-fA-F:.]{2,45}|dns(?:4|6|addr)?/[A-Za-z0-9._-]+)"
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9._\[\]:-]{1,253}(?:/[A-Za-z0-9._~/-]{0,200})?")
_ADDRESS = re.compile(rf"/{_HOST}/tcp/(\d{{1,5}})(?:/p2p/([1-9A-HJ-NP-Za-km-z]+))?")


Hold = Literal["auto", "none"] | tuple[Subject, ...]
Kernels = Literal["auto", "avx512", "avx2", "fma", "torch"]


@dataclass(frozen=True)
class Config:
    """Everything that a node can be told.

    `hold` names experts of whichever model has them; `memory_bytes` is what weights and caches may
    take, `disk_bytes` what the store may (None: no bound), `authors` whose models a gpu node takes
    by itself ("all", or peer ids), `hub_endpoint` is where `hf:` models come from, `kernels`
    what computes (`blyan_node.moe.arithmetic`), `precision` that in which matrices are held.
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
    kernels: Kernels = "auto"
    precision: Precision = PUBLISHED

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


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The keys of `config.toml`, as written; None where a key is left out."""

    role: Role | None = None
    listen: list[str] | None = None
    announce: list[str] | None = None
    bootstrap: list[str] | None = None
    hold: str | list[str] | None = None
    memory: str | int | None = None
    disk: str | int | None = None
    threads: int | None = None
    replicas: int | None = None
    authors: str | list[str] | None = None
    hub_endpoint: str | None = None
    kernels: Kernels | None = None
    precision: Precision | None = None


KEYS = tuple(field.name for field in msgspec.structs.fields(Settings))


def read_settings(text: str | bytes) -> Settings:
    """The keys of a `config.toml`; raises `RemoteProtocolError` naming the key."""
    if len(text) > limits.node_config_bytes_max:
        raise RemoteProtocolError(FILE, f"over {limits.node_config_bytes_max} bytes")
    try:
        document = tomllib.loads(text if isinstance(text, str) else text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise RemoteProtocolError(FILE, str(error)[:200]) from None
    return settings_of(document, FILE + ": {}")


def settings_of(document: Mapping[str, Any], where: str) -> Settings:
    """Settings from plain values; `where` has `{}` for the key that an error names."""
    for key, value in document.items():
        if key not in KEYS:
            raise RemoteProtocolError(
                where.format(key[:40]), f"there is no such key; there are {', '.join(KEYS)}"
            )
        try:
            settings = msgspec.convert({key: value}, Settings)
        except (msgspec.ValidationError, RecursionError, OverflowError) as error:
            why = str(error).split(" - at ")[0]
            raise RemoteProtocolError(where.format(key), why[:200]) from None
        check(settings, where)
    return msgspec.convert(dict(document), Settings)


def check(settings: Settings, where: str) -> None:
    """Checks the values of the keys that are set; raises `RemoteProtocolError` naming the key."""
    for key in KEYS:
        value = getattr(settings, key)
        if value is None:
            continue
        try:
            _CHECKS[key](value)
        except RemoteProtocolError as error:
            raise RemoteProtocolError(where.format(key), error.why) from None


def make_config(
    home: Path, genesis: Genesis, rpc: Path | None, file: Settings, options: Settings
) -> Config:
    """The configuration of a node at `home` from its file and the command line's options."""

    def chosen(key: str, default: Any) -> Any:
        for settings in (options, file):
            if getattr(settings, key) is not None:
                return getattr(settings, key)
        return default

    role: Role = chosen("role", "main")
    hold = chosen("hold", None)
    memory, disk = chosen("memory", None), chosen("disk", None)
    return Config(
        home=home,
        genesis=genesis,
        rpc=rpc or Path(socket_path(str(home), os.getuid())),
        role=role,
        listen=tuple(chosen("listen", DEFAULT_LISTEN)),
        announce=tuple(chosen("announce", ())),
        bootstrap=tuple(chosen("bootstrap", ())),
        hold=DEFAULT_HOLD[role] if hold is None else parse_hold(hold),
        memory_bytes=_half_of_free_memory() if memory is None else parse_size(memory),
        disk_bytes=None if disk is None else parse_size(disk),
        threads=chosen("threads", None) or _cores(),
        replicas=chosen("replicas", 2),
        authors=_authors(chosen("authors", [] if genesis == DEVELOPMENT else "all")),
        hub_endpoint=chosen("hub_endpoint", _default_endpoint()).rstrip("/"),
        kernels=chosen("kernels", "auto"),
        precision=chosen("precision", PUBLISHED),
    )


def parse_hold(value: str | list[str]) -> Hold:
    """`auto`, `none`, or experts (`layer0.expert3,layer0.expert4`), in one text or a list.

    Raises `RemoteProtocolError`.
    """
    if value in ("auto", "none"):
        return value  # type: ignore[return-value]
    items = value.split(",") if isinstance(value, str) else value
    if not 0 < len(items) <= limits.release_subjects_max:
        raise RemoteProtocolError("hold", "write auto, none, or subjects: layer0.expert3,…")
    return tuple(_hold_item(item.strip()) for item in items)


def _hold_item(text: str) -> Subject:
    if parse_subject(text).expert is None:
        raise RemoteProtocolError("hold", f"{text!r} is no expert; only experts are held")
    return Subject(text)


def _check_addresses(addresses: list[str]) -> None:
    if len(addresses) > ADDRESSES_MAX:
        raise RemoteProtocolError("", f"{len(addresses)} addresses, at most {ADDRESSES_MAX}")
    for address in addresses:
        _check_address(address)


def _check_address(address: str) -> str | None:
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[1]) > 65_535:
        raise RemoteProtocolError(
            "", f"{address[:120]!r} is no address of the form /ip4/192.0.2.1/tcp/4040"
        )
    if match[2]:
        key_of(match[2])
    return match[2]


def _check_bootstrap(addresses: list[str]) -> None:
    _check_addresses(addresses)
    for address in addresses:
        if _check_address(address) is None:
            raise RemoteProtocolError("", f"{address!r} needs /p2p/PEER_ID at its end")


def _check_at_least_one(addresses: list[str]) -> None:
    if not addresses:
        raise RemoteProtocolError("", "at least one address is needed")
    _check_addresses(addresses)


def _check_range(low: int, high: int) -> Any:
    def check(value: int) -> None:
        if not low <= value <= high:
            raise RemoteProtocolError("", f"{value} is not between {low} and {high}")

    return check


def _authors(value: str | list[str]) -> Literal["all"] | tuple[PeerId, ...]:
    if value == "all":
        return "all"
    if isinstance(value, str):
        raise RemoteProtocolError("", 'write "all" or a list of peer ids')
    for peer in value:
        key_of(peer)
    return tuple(PeerId(peer) for peer in value)


@cache
def _half_of_free_memory() -> int:
    """As it is when the process starts: what the node itself takes later is no reason for less."""
    return free_memory_bytes() // 2


def _default_endpoint() -> str:
    """As the hub's own tools have it: HF_ENDPOINT, or the public hub."""
    endpoint = os.environ.get("HF_ENDPOINT") or HUB_ENDPOINT
    _check_endpoint(endpoint)
    return endpoint


def _check_endpoint(endpoint: str) -> None:
    if not _ENDPOINT.fullmatch(endpoint):
        raise RemoteProtocolError("hub_endpoint", f"{endpoint[:120]!r} is no URL of a hub")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_CHECKS: Mapping[str, Any] = {
    "role": lambda role: get_args(Role).index(role),
    "listen": _check_at_least_one,
    "announce": _check_addresses,
    "bootstrap": _check_bootstrap,
    "hold": parse_hold,
    "memory": parse_size,
    "disk": parse_size,
    "threads": _check_range(1, 1024),
    "replicas": _check_range(1, limits.replicas_max),
    "authors": _authors,
    "hub_endpoint": _check_endpoint,
    "kernels": lambda kernels: get_args(Kernels).index(kernels),
    "precision": PRECISIONS.index,
}
