"""Writing made blocks into a store the way the chain service does."""

from collections.abc import Iterable

from blyan_node.testing.blocks import Made
from protocols.dag.admission import Accepted, admit
from storage.store import Store


def write(store: Store, made: Iterable[Made]) -> None:
    """Chunks, then what admission says, block by block."""
    for one in made:
        store.put_chunks(one.chunks)
        releases = {one.id: one.subjects} if one.subjects is not None else {}
        store.stage([], [(one.manifest_id, one.manifest_bytes)], release_subjects=releases)
        verdict = admit(one.block, store)
        if isinstance(verdict, Accepted):
            heads = {verdict.model: (verdict.heads, verdict.root)}
            store.accept(verdict.blocks, release_subjects=releases, heads=heads)
        else:
            store.stage([one.block])
