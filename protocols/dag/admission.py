"""Whether a block fits the chain that is here: the stages parents, base, author, body, release.

Blocks take effect in two ways. An *update* (parameters without `staged`) does so at once. The model
block and staged parameters *wait for a release*: they are kept, are not in the log, and enter it
together with the first accepted release that lists them, in one atomic step.

Every condition for acceptance is of the form "X is accepted" or "X is here", and a refusal depends
on nothing but what ids name. So the set of accepted blocks is the same whatever the order of
arrival, and a verdict of "not yet" (`Parked`) never turns into a wrong one.

    update    its parents are accepted; the base is of the same model and subject; the author is the
              model's; the manifest is here and as long as the header says
    staged    its parents are here, and the same
    release   its base is an accepted release of the model and lists the same subjects; every block
              that it lists is here, of this model and under its subject; their parents are
              accepted, or enter with it. Without a base, it lists blocks without a base.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from protocols.dag.header import Block, Kind
from protocols.dag.heads import advance
from protocols.dag.order import topological
from protocols.dag.release import release_entry
from protocols.dag.validate import Stage, is_staged, refuse
from protocols.dag.view import ChainView
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ManifestId, Root, Subject, model_root
from protocols.tensors.manifest import Manifest


class Accepted(msgspec.Struct, frozen=True):
    """The block takes effect: what is to be written, in one atomic step.

    `blocks` are new in the log, parents first; `subjects` is the body of the release, if it is one;
    `heads` and `root` are those of `model` afterwards.
    """

    model: BlockId
    blocks: tuple[Block, ...]
    subjects: Mapping[Subject, BlockId] | None
    heads: Mapping[Subject, BlockId]
    root: Root


class Staged(msgspec.Struct, frozen=True):
    """The block fits, and waits for a release that lists it."""

    block: Block


class Parked(msgspec.Struct, frozen=True):
    """Not yet: what has to come first. `blocks` are not here, `unaccepted` are here and wait.

    `bodies` are releases whose body is not here.
    """

    block: Block
    blocks: frozenset[BlockId] = frozenset()
    unaccepted: frozenset[BlockId] = frozenset()
    manifests: frozenset[ManifestId] = frozenset()
    bodies: frozenset[BlockId] = frozenset()

    @property
    def waits_for(self) -> frozenset[bytes]:
        """Everything whose arrival makes it worth trying again."""
        return frozenset((*self.blocks, *self.unaccepted, *self.manifests, *self.bodies))


class Duplicate(msgspec.Struct, frozen=True):
    """The block is here already."""

    block: Block


Admission = Accepted | Staged | Parked | Duplicate


@dataclass(slots=True)
class _Wants:
    blocks: set[BlockId] = field(default_factory=set)
    unaccepted: set[BlockId] = field(default_factory=set)
    manifests: set[ManifestId] = field(default_factory=set)
    bodies: set[BlockId] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.blocks or self.unaccepted or self.manifests or self.bodies)

    def here(self, ids: Iterable[BlockId], view: ChainView) -> None:
        self.blocks.update(id for id in ids if view.block(id) is None)

    def accepted(self, ids: Iterable[BlockId], view: ChainView) -> None:
        for id in ids:
            if not view.is_accepted(id):
                (self.blocks if view.block(id) is None else self.unaccepted).add(id)

    def parked(self, block: Block) -> Parked:
        return Parked(
            block,
            frozenset(self.blocks),
            frozenset(self.unaccepted),
            frozenset(self.manifests),
            frozenset(self.bodies),
        )


def waits_for_release(block: Block) -> bool:
    """Whether a block takes effect only together with a release."""
    return block.header.kind is Kind.MODEL or is_staged(block.header)


def admit(block: Block, view: ChainView) -> Admission:
    """Decides about a block that passed `validate_header`.

    Raises `RemoteProtocolError` for a block that can never be accepted.
    """
    header = block.header
    waits = waits_for_release(block)
    if view.block(block.id) is not None and (waits or view.is_accepted(block.id)):
        return Duplicate(block)
    wants = _Wants()
    _parents(block, waits, view, wants)
    _base(block, view)
    _author(block, view)
    _body(block, view, wants)
    if wants:
        return wants.parked(block)
    if waits:
        return Staged(block)
    assert header.model is not None
    if header.kind is Kind.RELEASE:
        return _release(block, header.model, view)
    heads = advance(header.model, (block,), view)
    return Accepted(header.model, (block,), None, heads, model_root(header.model, heads))


def check_release(block: Block, subjects: Mapping[Subject, BlockId], view: ChainView) -> None:
    """Raises `RemoteProtocolError` if what is here already shows that a release can never fit."""
    header = block.header
    assert header.model is not None
    for subject, id in subjects.items():
        if (listed := view.block(id)) is not None:
            _listed(listed, subject, header.model, first=header.base is None)
    if header.base is not None:
        before = view.release_subjects(header.base)
        if before is not None and before.keys() != subjects.keys():
            refuse(Stage.RELEASE, "it lists other subjects than the release before")


def _parents(block: Block, waits: bool, view: ChainView, wants: _Wants) -> None:
    header = block.header
    if waits:
        wants.here(header.depends_on, view)
    elif header.kind is Kind.RELEASE:
        wants.accepted((id for id in header.depends_on if id != header.model), view)
        if header.model is not None:
            wants.here((header.model,), view)
    else:
        wants.accepted(header.depends_on, view)
    if header.model is not None:
        model = view.block(header.model)
        if model is not None and model.header.kind is not Kind.MODEL:
            refuse(Stage.PARENTS, "its model is not a model block")


def _base(block: Block, view: ChainView) -> None:
    header = block.header
    if header.base is None or (base := view.block(header.base)) is None:
        return
    of = base.header
    if (of.kind, of.model, of.subject) != (header.kind, header.model, header.subject):
        refuse(Stage.BASE, "its base is not of the same model and subject")


def _author(block: Block, view: ChainView) -> None:
    header = block.header
    if header.model is None or (model := view.block(header.model)) is None:
        return
    if header.author != model.header.author:
        refuse(Stage.AUTHOR, "its author is not the model's")


def _body(block: Block, view: ChainView, wants: _Wants) -> None:
    header = block.header
    assert header.body is not None, "validate_header lets no block without a body pass"
    manifest = view.manifest(header.body)
    if manifest is None:
        wants.manifests.add(header.body)
        return
    check_body(block, manifest)


def check_body(block: Block, manifest: Manifest) -> None:
    """Raises `RemoteProtocolError` if the manifest that a block names does not fit its header."""
    if manifest.size != block.header.size:
        refuse(Stage.BODY, f"its manifest has {manifest.size} bytes, not {block.header.size}")
    if block.header.kind is Kind.RELEASE:
        try:
            release_entry(manifest)
        except RemoteProtocolError as error:
            refuse(Stage.BODY, error.why)


def _listed(listed: Block, subject: Subject, model: BlockId, *, first: bool) -> None:
    header = listed.header
    if header.model != model or header.subject != subject:
        refuse(Stage.RELEASE, f"what it lists as {subject} is a block of something else")
    if first and header.base is not None:
        refuse(Stage.RELEASE, f"it is a first release, and its {subject} has a base")


def _release(block: Block, model: BlockId, view: ChainView) -> Admission:
    subjects = view.release_subjects(block.id)
    if subjects is None:
        return Parked(block, bodies=frozenset((block.id,)))
    check_release(block, subjects, view)
    wants = _Wants()
    wants.here(subjects.values(), view)
    if wants:
        return wants.parked(block)
    entering = {model, *subjects.values()}
    new = [b for id in entering if not view.is_accepted(id) and (b := view.block(id)) is not None]
    for b in new:
        wants.accepted((id for id in b.header.depends_on if id not in entering), view)
    if wants:
        return wants.parked(block)
    by_id = {b.id: b for b in (*new, block)}
    order = topological(new)
    blocks = (*(by_id[id] for id in order), block)
    heads = advance(model, blocks, view)
    return Accepted(model, blocks, dict(subjects), heads, model_root(model, heads))
