"""`node.config`: what the node goes by, and where each value came from."""

from typing import Literal

from protocols.rpc.fields import Count, Request, Result


class ConfigRequest(Request, frozen=True):
    """No parameters."""


class SettingInfo(Result, frozen=True):
    """A key of `config.toml` and the value in use, as it was given.

    `source` says by whom, `line` where in `config.toml`, `variable` which variable of the
    environment. `reloaded` is the time, in s since 1970, of the reload that brought the value, None
    if it counts since the start. `waiting` if the file has had another value since, which takes
    effect at the next start.
    """

    key: str
    value: str | int | list[str] | None
    source: Literal["default", "file", "environment", "option"]
    line: Count | None
    variable: str | None
    reloaded: float | None
    waiting: bool


class ConfigResult(Result, frozen=True):
    """All settings, of a node that runs or of a home whose node does not. Keys are never shown."""

    home: str
    rpc: str
    network: str
    running: bool
    settings: list[SettingInfo]
