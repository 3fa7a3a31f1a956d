"""A new configuration for a node that runs: what takes effect at once, and what a start takes.

The file is read again with the command line's options still on top of it. A configuration that is
wrong changes nothing.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blyan_node.config import FIELDS, Config
from blyan_node.log_areas import apply_levels
from blyan_node.parts import App
from blyan_node.services.placement import PlacementConfig
from blyan_node.settings import KEYS
from protocols.errors import Refused, RemoteProtocolError
from protocols.ids import BlockId, PeerId, peer_id_of
from protocols.signing import Identity
from storage.store import Store

log = logging.getLogger(__name__)

LIVE = ("bootstrap", "hold", "disk", "replicas", "authors", "allowed_peers", "log_level")
"""The keys of `config.toml` that take effect without a new start."""


@dataclass(frozen=True)
class Changes:
    """The keys whose values differ: those that take effect now, and those that wait."""

    live: tuple[str, ...]
    waiting: tuple[str, ...]


def changes(before: Config, after: Config) -> Changes:
    """What a node that runs with `before` is to do about `after`."""
    differ = [key for key in KEYS if _value(before, key) != _value(after, key)]
    return Changes(
        tuple(key for key in differ if key in LIVE),
        tuple(key for key in differ if key not in LIVE),
    )


def _value(config: Config, key: str) -> Any:
    return getattr(config, FIELDS.get(key, key))


class Reloading:
    """Applies configurations to one node. `read` reads the home again, as `start` did."""

    def __init__(self, app: App, read: Callable[[], Config]) -> None:
        self._app = app
        self._read = read

    async def reload(self) -> Changes:
        """Reads the configuration and applies what can be; says the rest in the log."""
        try:
            after = self._read()
        except (Refused, RemoteProtocolError, OSError) as error:
            log.error("the configuration was not read again, nothing has changed: %s", error)
            return Changes((), ())
        before = self._app.in_use.config
        found = changes(before, after)
        failed = [key for key in found.live if not await self._takes(key, after)]
        done = Changes(
            tuple(key for key in found.live if key not in failed), (*found.waiting, *failed)
        )
        self._app.in_use.take(after, done.live, done.waiting, time.time())
        log.info("configuration read again; changed: %s", ", ".join(done.live) or "nothing")
        if gone := [node for node in before.bootstrap if node not in after.bootstrap]:
            log.warning("bootstrap nodes that are forgotten at the next start only: %s",
                        ", ".join(gone))  # fmt: skip
        if done.waiting:
            log.warning("changed in config.toml, but in use from the next start only: %s",
                        ", ".join(done.waiting))  # fmt: skip
        return done

    async def _takes(self, key: str, after: Config) -> bool:
        """Goes by `after` in this key; whether that went well. A bug ends no node that serves."""
        try:
            await self._apply(key, after)
        except Exception as error:
            log.error("%s could not be changed: a bug of ours", key, exc_info=error)
            return False
        return True

    async def _apply(self, key: str, after: Config) -> None:
        app = self._app
        match key:
            case "bootstrap":
                app.network.add_bootstrap(after.bootstrap)
            case "allowed_peers":
                app.network.set_allowed(allowed_peers(after))
            case "log_level":
                apply_levels(after.log_level)
            case "disk":
                app.store.set_quota(after.disk_bytes)
            case _:  # hold, replicas, authors
                app.adverts.set_auto(after.hold == "auto")
                await app.placement.configure(placement_config(after, app.identity, app.store))


def allowed_peers(config: Config) -> frozenset[PeerId] | None:
    """Who may take part in the network; None: everybody."""
    return None if config.allowed_peers == "all" else frozenset(config.allowed_peers)


def placement_config(config: Config, identity: Identity, store: Store) -> PlacementConfig:
    """What the node takes by itself: by plan, by list, or nothing; its own models and those of
    listed authors.
    """

    def may_take(model: BlockId) -> bool:
        if config.authors == "all":
            return True
        block = store.block(model)
        return block is not None and (
            block.header.author == identity.public
            or peer_id_of(block.header.author) in config.authors
        )

    if isinstance(config.hold, str):
        return PlacementConfig(config.hold, config.replicas, may_take=may_take)
    return PlacementConfig("list", config.replicas, frozenset(config.hold), may_take)
