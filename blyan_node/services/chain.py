"""The chain of this node: what is accepted, who is told of it, and what a model is called.

Blocks enter through `submit` alone, whether they are our own or a peer's; decisions and writes
happen one after another on one thread. What takes effect is told to everybody who listens.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from blyan_node.network.fanout import Fanout
from blyan_node.services.changes import Changes
from blyan_node.services.intake import OURSELVES, Intake, Outcome, read_release
from protocols import limits
from protocols.dag.admission import Accepted, Duplicate, Parked, Staged
from protocols.dag.header import Block, Kind
from protocols.dag.heads import Fork, Heads, heads_of
from protocols.dag.validate import validate_header
from protocols.errors import ErrorCode, LocalProtocolError, Refused, RemoteProtocolError
from protocols.ids import (
    BlockId,
    ManifestId,
    NetworkId,
    PeerId,
    Root,
    Subject,
    cid_text,
    model_root,
)
from protocols.tensors.manifest import Manifest
from storage.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReleaseAccepted:
    """A release took effect; `blocks` are new in the log with it, itself the last."""

    model: BlockId
    release: Block
    blocks: tuple[Block, ...]
    root: Root
    ours: bool


@dataclass(frozen=True, slots=True)
class UpdateAccepted:
    """An update of one subject took effect."""

    model: BlockId
    update: Block
    root: Root
    ours: bool

    @property
    def blocks(self) -> tuple[Block, ...]:
        """What is new in the log."""
        return (self.update,)


ChainEvent = ReleaseAccepted | UpdateAccepted


class Chain:
    """The accepted chain of one network. `clock_ms` is the wall clock."""

    def __init__(self, store: Store, network: NetworkId, clock_ms: Callable[[], int]) -> None:
        self.store = store
        self.network = network
        self.clock_ms = clock_ms
        self.changes = Changes()
        self._intake = Intake(store)
        self._events = Fanout[ChainEvent]()
        self._writes = trio.CapacityLimiter(1)
        self._models: dict[BlockId, Block] = {}

    @property
    def parked(self) -> int:
        """How many blocks wait for others."""
        return len(self._intake.pool)

    def events(self) -> trio.MemoryReceiveChannel[ChainEvent]:
        """What takes effect from now on; a slow listener loses the oldest."""
        return self._events.add(limits.chain_events_max).receiver

    async def submit(
        self,
        blocks: Sequence[Block],
        manifests: Sequence[tuple[ManifestId, bytes]],
        source: PeerId | None,
    ) -> list[Outcome]:
        """Decides about blocks; those of a peer have passed `decode_block`.

        The outcomes of `blocks` come first, in their order, then those of blocks that had waited
        for them. A peer's bad block is an outcome. One of our own (`source` None) that does not
        take effect or become staged raises `Refused` or `LocalProtocolError`.
        """
        take = partial(self._take, blocks, manifests, source)
        outcomes = await trio.to_thread.run_sync(take, limiter=self._writes)
        self._tell(outcomes)
        if source is None:
            for outcome in outcomes[: len(blocks)]:
                _require_taken(outcome)
        return outcomes

    async def read_release(self, release: Block, source: PeerId | None) -> list[Outcome]:
        """The chunks of a parked release's body are here: decides about it again.

        Raises `BlockMissing` if they are not.
        """
        read = partial(self._read_release, release, source or OURSELVES)
        outcomes = await trio.to_thread.run_sync(read, limiter=self._writes)
        self._tell(outcomes)
        return outcomes

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Returns once `condition` holds; it is looked at after every change of the chain."""
        while not condition():
            await self.changes.wait()

    # Looking

    def models(self) -> Mapping[BlockId, Block]:
        """The accepted models, as the store has them at this moment."""
        self._models = {id: self._models.get(id) or self._known(id) for id in self.store.models()}
        return self._models

    def heads(self, model: BlockId) -> Mapping[Subject, BlockId]:
        """The current block of each subject of an accepted model."""
        return self.store.heads(model)

    def root(self, model: BlockId) -> Root:
        """The current root of an accepted model."""
        return model_root(model, self.heads(model))

    def heads_and_forks(self, model: BlockId) -> Heads | None:
        """Everything recomputed from the blocks: heads, root and the forks that were kept."""
        return heads_of(model, self.store)

    def forks(self, model: BlockId) -> tuple[Fork, ...]:
        """The forks on the way to the current heads."""
        whole = self.heads_and_forks(model)
        return () if whole is None else whole.forks

    def find_model(self, text: str) -> Block:
        """The model that a person means by a name, `name@id` or an id.

        Raises `Refused`: `NOT_FOUND`, or `AMBIGUOUS` where two authors use one name.
        """
        models = self.models().values()
        found = [b for b in models if text in _called(b)]
        if len(found) == 1:
            return found[0]
        if found:
            choices = sorted(_full_name(b) for b in found)
            raise Refused(
                ErrorCode.AMBIGUOUS,
                f"{text} names {len(found)} models",
                "two authors use this name",
                f"Say which one: {', '.join(choices)}",
                {"model": text, "choices": choices},
            )
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"no model {text[:200]}",
            f"this node knows {len(models)} models",
            "`blyan-node model list` shows them; a new node may still be catching up.",
            {"model": text[:200]},
        )

    def _known(self, id: BlockId) -> Block:
        block = self.store.block(id)
        assert block is not None, "an accepted model is in the store"
        return block

    def _take(
        self,
        blocks: Sequence[Block],
        manifests: Sequence[tuple[ManifestId, bytes]],
        source: PeerId | None,
    ) -> list[Outcome]:
        if source is None:
            for block in blocks:
                validate_header(block, network=self.network, now_ms=self.clock_ms())
        decoded = {id: (Manifest.decode(data), data) for id, data in manifests}
        return self._intake.take(blocks, decoded, source or OURSELVES)

    def _read_release(self, release: Block, source: str) -> list[Outcome]:
        try:
            read_release(self.store, release)
        except RemoteProtocolError as error:
            self._intake.forget(release)
            return [Outcome(release, source, error)]
        return self._intake.take([release], {}, source)

    def _tell(self, outcomes: Sequence[Outcome]) -> None:
        """Tells listeners of what took effect, in the order in which it did."""
        changed = False
        for outcome in outcomes:
            verdict = outcome.verdict
            if isinstance(verdict, RemoteProtocolError):
                log.info("refused block %s: %s", cid_text(outcome.block.id), verdict)
            if isinstance(verdict, Accepted):
                changed = True
                self._events.put(_event(outcome, verdict))
        if changed:
            self.changes.tell()


def _event(outcome: Outcome, accepted: Accepted) -> ChainEvent:
    ours = outcome.source == OURSELVES
    block = outcome.block
    if block.header.kind is Kind.RELEASE:
        log.info("release %s of model %s", cid_text(block.id), cid_text(accepted.model))
        return ReleaseAccepted(accepted.model, block, accepted.blocks, accepted.root, ours)
    log.info("update %s of %s", cid_text(block.id), block.header.subject)
    return UpdateAccepted(accepted.model, block, accepted.root, ours)


def _require_taken(outcome: Outcome) -> None:
    match outcome.verdict:
        case Accepted() | Staged() | Duplicate():
            return
        case Parked() as parked:
            missing = sorted(cid_text(id) for id in parked.waits_for)
            raise LocalProtocolError(f"our own block waits for {', '.join(missing[:5])}")
        case RemoteProtocolError() as error:
            raise Refused(
                ErrorCode.NOT_ALLOWED,
                "the block was not accepted",
                error.why,
                data={"block": cid_text(outcome.block.id)},
            )


def _full_name(model: Block) -> str:
    return f"{model.header.meta['name']}@{cid_text(model.id)}"


def _called(model: Block) -> tuple[str, str, str]:
    return str(model.header.meta["name"]), cid_text(model.id), _full_name(model)
