"""The keys of `config.toml`, which are those of `start`'s options too, and what each may be.

A value that is wrong raises `RemoteProtocolError` whose `where` is the key.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import msgspec

from blyan_node.log_areas import parse_log_levels
from blyan_node.metrics.address import MetricsAddress, parse_metrics_address
from blyan_node.sizes import parse_size
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, Subject, key_of, parse_subject
from protocols.precision import PRECISIONS, Precision

Role = Literal["main", "gpu"]
Hold = Literal["auto", "none"] | tuple[Subject, ...]
Kernels = Literal["auto", "avx512", "avx2", "fma", "torch"]

ADDRESSES_MAX = 64
_HOST = r"(?:ip4/\d{1,3}(?:\.\d{1,3}){3}|ip6/[0-9a-fA-F:.]{2,45}|dns(?:4|6|addr)?/[A-Za-z0-9._-]+)"
_ENDPOINT = re.compile(r"https?://[A-Za-z0-9._\[\]:-]{1,253}(?:/[A-Za-z0-9._~/-]{0,200})?")
_ADDRESS = re.compile(rf"/{_HOST}/tcp/(\d{{1,5}})(?:/p2p/([1-9A-HJ-NP-Za-km-z]+))?")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(?::(?:0|[1-9]\d?))?")
DEVICES = "auto, cpu, cuda, cuda:N, mps"
_SHOWN_MAX = 40
_KINDS = {
    "int": "a whole number",
    "float": "a number with a point",
    "str": "a text in quotes",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "datetime": "a date and time",
    "date": "a date",
    "time": "a time of day",
}
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "role": get_args(Role),
    "kernels": get_args(Kernels),
    "precision": PRECISIONS,
}
_TYPES = re.compile(r"Expected `([a-z |]+)`, got `([a-z]+)`")


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
    psk: str | None = None
    allowed_peers: str | list[str] | None = None
    metrics: str | None = None
    log_level: str | None = None
    device: str | None = None
    kernels: Kernels | None = None
    precision: Precision | None = None


KEYS = tuple(field.name for field in msgspec.structs.fields(Settings))


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Settings from the command line's options; raises `RemoteProtocolError` naming the option."""
    for key, value in options.items():
        try:
            check(key, value)
        except RemoteProtocolError as error:
            name = key[:_SHOWN_MAX].replace("_", "-")
            raise RemoteProtocolError(f"--{name}", error.why) from None
    return msgspec.convert(dict(options), Settings)


def check(key: str, value: Any) -> None:
    """Checks one key and its value; raises `RemoteProtocolError`."""
    if key not in KEYS:
        raise RemoteProtocolError(key[:_SHOWN_MAX], _no_such(key))
    try:
        settings = msgspec.convert({key: value}, Settings)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise RemoteProtocolError(key, _in_words(key, value, str(error))[:200]) from None
    try:
        _CHECKS[key](getattr(settings, key))
    except RemoteProtocolError as error:
        raise RemoteProtocolError(key, error.why) from None


def _no_such(key: str) -> str:
    """That there is no such key, and which is meant."""
    near = difflib.get_close_matches(key[:_SHOWN_MAX].replace("-", "_").lower(), KEYS, 1)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(KEYS)}"
    return f"there is no key {key[:_SHOWN_MAX]!r}; {meant}"


def _in_words(key: str, value: Any, why: str) -> str:
    """What the decoder found, in the words of whoever writes the file."""
    if key in _CHOICES:
        return f"{str(value)[:_SHOWN_MAX]!r} is not one of {', '.join(_CHOICES[key])}"
    match = _TYPES.search(why)
    if match is None:
        return why.split(" - at ")[0]
    wanted = [_KINDS[name] for name in match[1].split(" | ") if name in _KINDS]
    return f"it must be {' or '.join(wanted)}, and is {_KINDS.get(match[2], match[2])}"


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


def parse_peers(value: str | list[str]) -> Literal["all"] | tuple[PeerId, ...]:
    """`all`, or peer ids; raises `RemoteProtocolError`."""
    if value == "all":
        return "all"
    if isinstance(value, str):
        raise RemoteProtocolError("", 'write "all" or a list of peer ids')
    for peer in value:
        key_of(peer)
    return tuple(PeerId(peer) for peer in value)


def parse_metrics(value: str) -> MetricsAddress | None:
    """`off`, or where Prometheus may read; raises `RemoteProtocolError`."""
    return None if value == "off" else parse_metrics_address(value)


def _check_path(path: str) -> None:
    if not 0 < len(path) <= 4096 or not path.isprintable():
        raise RemoteProtocolError("", "not the path of a file")


def _check_device(device: str) -> None:
    if not _DEVICE.fullmatch(device):
        raise RemoteProtocolError("", f"{device[:_SHOWN_MAX]!r} is not one of {DEVICES}")


def check_endpoint(endpoint: str) -> None:
    """Raises `RemoteProtocolError` for what is no URL of a hub."""
    if not _ENDPOINT.fullmatch(endpoint):
        raise RemoteProtocolError("hub_endpoint", f"{endpoint[:120]!r} is no URL of a hub")


_CHECKS: Mapping[str, Any] = {
    "role": _CHOICES["role"].index,
    "listen": _check_at_least_one,
    "announce": _check_addresses,
    "bootstrap": _check_bootstrap,
    "hold": parse_hold,
    "memory": parse_size,
    "disk": parse_size,
    "threads": _check_range(1, 1024),
    "replicas": _check_range(1, limits.replicas_max),
    "authors": parse_peers,
    "hub_endpoint": check_endpoint,
    "psk": _check_path,
    "allowed_peers": parse_peers,
    "metrics": parse_metrics,
    "log_level": parse_log_levels,
    "device": _check_device,
    "kernels": _CHOICES["kernels"].index,
    "precision": _CHOICES["precision"].index,
}
