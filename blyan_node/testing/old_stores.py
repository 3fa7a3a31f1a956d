"""A small store that has a row of every kind: kept in the repository as each schema wrote it.

`tests/storage/stores/schema-N.tar.gz` is `HOME/data` of a node of schema N. A release that changes
what is stored adds one, and opens all that are there. To write the one of the current schema:

    python -m blyan_node.testing.old_stores tests/storage/stores
"""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

from blyan_node.testing.blocks import Author
from blyan_node.testing.writing import write
from protocols import limits
from protocols.ids import BlockId
from protocols.signing import Identity
from storage import keys
from storage.pins import Pin
from storage.schema import SCHEMA_VERSION
from storage.store import Store, open_store

CURSOR = (Identity.from_seed(bytes(32)).peer_id, bytes(range(16)), 7)
WEIGHTS = bytes(limits.chunk_bytes) + b"a second chunk, which is short"
_OF_A_PROCESS = ("lock", "LOCK", "LOG", "LOG.old")  # nothing that a store needs


def fill(store: Store) -> dict[str, BlockId]:
    """A model with an update, a fork, a second release and a staged part; its blocks by name."""
    alice = Author("alice")
    model, embed, expert, release = alice.publish()
    write(store, [model, embed, expert, release])
    better, other = alice.update(expert, WEIGHTS), alice.update(expert, b"a fork")
    write(store, [better, other])
    second = alice.release(model.id, [embed, better], base=release.id)
    write(store, [second])
    staged = alice.part(model.id, "layer0.expert1", b"waits for its release")
    write(store, [staged])
    store.pin(model.id, embed.id, reason=Pin.PUBLISHED)
    store.pin(better.id, reason=Pin.HELD)
    store.pin(expert.id, reason=Pin.WANTED)
    store.set_cursor(*CURSOR)
    store.pack(better.id)
    made = (model, embed, expert, release, better, other, second, staged)
    names = ("model", "embed", "expert", "release", "better", "other", "second", "staged")
    return {name: one.id for name, one in zip(names, made, strict=True)}


def kinds(store: Store) -> set[bytes]:
    """The tags of the rows that a store has."""
    rows = (key[:1] for key, _ in store.index.engine.iterate(b""))
    return set(rows) | {key[:1] for key, _ in store.chunks.data.iterate(b"")}


def pack_up(data: Path) -> bytes:
    """The files of a closed store, as an archive without owners and times."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for path in sorted(data.rglob("*")):
            if path.name in _OF_A_PROCESS:
                continue
            entry = archive.gettarinfo(path, str(path.relative_to(data)))
            entry.uid = entry.gid = entry.mtime = 0
            entry.uname = entry.gname = ""
            with path.open("rb") if path.is_file() else io.BytesIO() as file:
                archive.addfile(entry, file if path.is_file() else None)
    return out.getvalue()


def main(folder: Path) -> None:
    """Writes the store of the current schema; never over one that is there."""
    with tempfile.TemporaryDirectory() as made:
        data = Path(made) / "data"
        with open_store(data) as store:
            fill(store)
        with open_store(data) as store:  # opening sorts LevelDB's log into a file: both are there
            store.set_cursor(*CURSOR)
            assert keys.SCHEMA_KEY in kinds(store)
        with (folder / f"schema-{SCHEMA_VERSION}.tar.gz").open("xb") as file:
            file.write(pack_up(data))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
