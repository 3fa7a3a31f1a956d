"""Areas of the log and their levels: `info,network=debug,rpc=warning`.

An area is a part of the node as its operator knows it. The first word of a setting without `=` is
the level of every area that is not named.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from protocols.errors import RemoteProtocolError

LEVELS: Mapping[str, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_SERVICES = "blyan_node.services."
_REST = "node"  # whatever has no area of its own: start, stop, configuration
_AREAS: Mapping[str, tuple[str, ...]] = {
    _REST: ("blyan_node", "blyan"),
    "network": ("blyan.network", "blyan_node.network"),
    "chain": tuple(_SERVICES + name for name in ("chain", "intake", "authoring", "update")),
    "sync": tuple(_SERVICES + name for name in ("sync", "acquire", "asking", "fetch", "gossip")),
    "experts": tuple(
        _SERVICES + name for name in ("holding", "placement", "directory", "layers", "serving")
    ),
    "models": (
        "blyan_node.hub",
        "blyan_node.moe",
        *(_SERVICES + name for name in ("generation", "models", "texts", "publish", "hub")),
    ),
    "rpc": ("blyan_node.rpc",),
    "metrics": ("blyan_node.metrics",),
}
AREAS = tuple(_AREAS)
_AREA_OF = {logger: area for area, loggers in _AREAS.items() for logger in loggers}


@dataclass(frozen=True)
class LogLevels:
    """The level of each area that has its own, and of all others."""

    default: int = logging.INFO
    areas: Mapping[str, int] = field(default_factory=dict)


def parse_log_levels(text: str) -> LogLevels:
    """Reads `LEVEL`, `AREA=LEVEL,…` or both; raises `RemoteProtocolError`."""
    default, areas = logging.INFO, {}
    for index, word in enumerate(part.strip() for part in text[:1000].split(",")):
        area, equals, level = word.rpartition("=")
        if level not in LEVELS:
            raise RemoteProtocolError(
                "log_level", f"{level[:40]!r} is no level; there are {', '.join(LEVELS)}"
            )
        if equals and area not in AREAS:
            raise RemoteProtocolError(
                "log_level", f"{area[:40]!r} is no area; there are {', '.join(AREAS)}"
            )
        if equals:
            areas[area] = LEVELS[level]
        elif index == 0:
            default = LEVELS[level]
        else:
            raise RemoteProtocolError("log_level", f"write AREA={level}: only the first is for all")
    return LogLevels(default, areas)


def area_of(logger: str) -> str:
    """The area that a logger's lines belong to."""
    name = logger
    while name:
        if name in _AREA_OF:
            return _AREA_OF[name]
        name = name.rpartition(".")[0]
    return _REST


def apply_levels(levels: LogLevels) -> None:
    """From now on each area says what its level lets through."""
    for logger, area in _AREA_OF.items():
        logging.getLogger(logger).setLevel(levels.areas.get(area, levels.default))
