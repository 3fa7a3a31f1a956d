"""Which block is current for each subject of a model, and where its history forks.

`heads_of` is the reference: start from what the first release lists, then follow each subject's
accepted updates by `base`. Where several blocks share a base, the smallest id wins on every node;
the others are kept and shown as a fork. Of several first releases the smallest id wins likewise.
The result depends on the set of accepted blocks alone, never on the order in which they came.

`advance` gives the same result from the heads that were kept before, at a cost that does not grow
with the length of the history.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from protocols.dag.header import Block, Kind
from protocols.dag.view import ChainView, Overlay
from protocols.ids import BlockId, Root, Subject, model_root


@dataclass(frozen=True, slots=True)
class Fork:
    """Several accepted blocks that replace one: `base` is None where first releases compete."""

    model: BlockId
    subject: Subject | None  # None: releases
    base: BlockId | None
    chosen: BlockId
    others: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True)
class Heads:
    """The current blocks of a model, their root, and the forks on the way to them."""

    heads: dict[Subject, BlockId]
    root: Root
    forks: tuple[Fork, ...]


def first_releases(model: BlockId, view: ChainView) -> list[BlockId]:
    """The accepted releases without a base, the one that counts first."""
    ids = view.releases(model)
    return sorted(id for id in ids if (b := view.block(id)) is not None and b.header.base is None)


def heads_of(model: BlockId, view: ChainView) -> Heads | None:
    """Everything recomputed from the blocks; None while the model has no accepted release."""
    firsts = first_releases(model, view)
    if not firsts:
        return None
    forks: list[Fork] = []
    if len(firsts) > 1:
        forks.append(Fork(model, None, None, firsts[0], tuple(firsts[1:])))
    start = view.release_subjects(firsts[0])
    assert start is not None, "the body of an accepted release is kept"
    heads = {s: _walk(model, s, id, view, forks) for s, id in sorted(start.items())}
    return Heads(heads, model_root(model, heads), tuple(forks))


def advance(model: BlockId, accepted: Sequence[Block], view: ChainView) -> dict[Subject, BlockId]:
    """The heads after `accepted` (one release with its blocks, or one update) enter `view`.

    `view` is the chain before; its `heads` are trusted. Equal to `heads_of` on the chain after.
    """
    after = Overlay(view, accepted=accepted)
    if any(b.header.kind is Kind.RELEASE and b.header.base is None for b in accepted):
        whole = heads_of(model, after)
        assert whole is not None
        return whole.heads
    heads = dict(view.heads(model))
    for block in accepted:
        subject, base = block.header.subject, block.header.base
        if subject is None or base is None:
            continue
        # A base counts if the walk from it ends at the head: then it is on the chosen path.
        if follow(base, view) == heads.get(subject):
            heads[subject] = follow(base, after)
    return heads


def follow(id: BlockId, view: ChainView) -> BlockId:
    """The last block of the chosen path that begins at `id`."""
    while successors := view.successors(id):
        id = min(successors)
    return id


def _walk(
    model: BlockId, subject: Subject, id: BlockId, view: ChainView, forks: list[Fork]
) -> BlockId:
    while successors := sorted(view.successors(id)):
        if len(successors) > 1:
            forks.append(Fork(model, subject, id, successors[0], tuple(successors[1:])))
        id = successors[0]
    return id
