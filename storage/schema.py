"""The first row of every store: which layout it has, and the name of its log.

A store of a version that this program does not know is refused before anything else is read. There
has been one version so far, so that nothing is to be migrated; docs/upgrading.md says what a change
of the layout has to bring. The log id is random: a peer that keeps a cursor into our log notices
when the log is another one.
"""

from typing import NamedTuple

from storage import keys
from storage.engine import Engine
from storage.errors import UnknownSchema

SCHEMA_VERSION = 1
LOG_ID_BYTES = 16


class Schema(NamedTuple):
    """The layout's version and the id of this store's log."""

    version: int
    log_id: bytes


def open_schema(engine: Engine, path: str, new_log_id: bytes) -> Schema:
    """Reads the schema row, or writes it to an empty store; raises `UnknownSchema`."""
    raw = engine.get(keys.SCHEMA_KEY)
    if raw is None:
        if next(engine.iterate(b""), None) is not None:
            raise UnknownSchema(path, "it has rows but does not say of which version")
        write_schema(engine, new_log_id)
        return Schema(SCHEMA_VERSION, new_log_id)
    version = int.from_bytes(raw[:4], "big")
    if version > SCHEMA_VERSION:
        raise UnknownSchema(
            path,
            f"a newer blyan-node wrote it: it has schema {version}, this program reads schema "
            f"{SCHEMA_VERSION}",
        )
    if version != SCHEMA_VERSION or len(raw) != keys.SCHEMA_VALUE.size:
        raise UnknownSchema(path, f"its first row says schema {version} and is none of ours")
    return Schema(*keys.SCHEMA_VALUE.unpack(raw))


def write_schema(engine: Engine, log_id: bytes) -> None:
    """Writes the row; on a store with a log this gives the log another name."""
    value = keys.SCHEMA_VALUE.pack(SCHEMA_VERSION, log_id)
    engine.batch([(keys.SCHEMA_KEY, value)], sync=True)


def restore_schema(engine: Engine, log_id: bytes) -> None:
    """Writes the row again if a repair of the database has lost it with what lay beside it."""
    if engine.get(keys.SCHEMA_KEY) is None:
        write_schema(engine, log_id)
