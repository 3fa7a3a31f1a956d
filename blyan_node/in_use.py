"""The configuration that a node goes by, and how it is told: each value and where it came from."""

from collections.abc import Collection
from dataclasses import replace

from blyan_node.config import ENDPOINT_VARIABLE, FIELDS, Config
from blyan_node.settings import KEYS
from protocols.ids import cid_text
from protocols.rpc.config import ConfigResult, SettingInfo


class InUse:
    """What a running node goes by: as it started, and what reloads have made of it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._reloaded: dict[str, float] = {}
        self._waiting: frozenset[str] = frozenset()

    def take(
        self, after: Config, live: Collection[str], waiting: Collection[str], now: float
    ) -> None:
        """Goes by `after` in all but the keys that wait; `live` have changed, at `now`."""
        fields = {FIELDS.get(key, key): getattr(after, FIELDS.get(key, key)) for key in live}
        origins = {
            key: self.config.origins[key] if key in waiting else after.origins[key] for key in KEYS
        }
        self.config = replace(self.config, **fields, origins=origins)
        self._reloaded |= dict.fromkeys(live, now)
        self._waiting = frozenset(waiting)

    def told(self) -> ConfigResult:
        """For the RPC."""
        return told(self.config, True, self._reloaded, self._waiting)


def told(
    config: Config,
    running: bool,
    reloaded: dict[str, float] | None = None,
    waiting: Collection[str] = (),
) -> ConfigResult:
    """The settings of a node that runs, or of a home whose node does not.

    No setting is a secret: of a swarm's key it is the name of the file.
    """
    times = reloaded or {}
    return ConfigResult(
        home=str(config.home),
        rpc=str(config.rpc),
        network=cid_text(config.genesis.id),
        running=running,
        settings=[
            SettingInfo(
                key=key,
                value=config.origins[key].value,
                source=config.origins[key].source,
                line=config.origins[key].line,
                variable=ENDPOINT_VARIABLE if config.origins[key].source == "environment" else None,
                reloaded=times.get(key),
                waiting=key in waiting,
            )
            for key in KEYS
        ],
    )
