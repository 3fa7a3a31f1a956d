"""Gets one MoE layer computed: here what is kept here, elsewhere what others hold, all at once.

What to send where, and what to do when a peer fails, is late or busy, is decided by
`protocols.forward.dispatch`; this module carries it out. An expert that nobody is left to compute
is loaded here if memory allows, from the store or from a peer that stores it; if not, a new holder
is waited for a moment, and then the request fails and names the expert and its block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import trio

from blyan_node.network.interface import PeerNetwork
from blyan_node.services.account import Account
from blyan_node.services.activation import Replied, ask
from blyan_node.services.compute import LayerRows, Rows, apply_expert, in_turn
from blyan_node.services.directory import Adverts
from blyan_node.services.held import NoRoom
from blyan_node.services.holding import Holding
from blyan_node.services.spread import Spread
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.experts.routing import Links
from protocols.forward.dispatch import Dispatch, Send, Step, Unserved
from protocols.forward.grouping import Need, group_rows
from protocols.forward.messages import Activated, Busy, NotHeld
from protocols.ids import BlockId, PeerId, cid_text, expert_subject
from protocols.metrics import BEHIND, LAYER_LABELS_MAX
from protocols.ready import Ready


@dataclass(frozen=True)
class _Here:
    """Needs computed on this node, one array of rows each."""

    needs: Sequence[Need]
    rows: Sequence[Rows]


@dataclass(frozen=True)
class _Again:
    """A need that could not be served so far is to be tried elsewhere."""

    need: Need


_Outcome = Replied | _Here | _Again | Refused


class Layers:
    """The experts of the swarm as one thing that computes layers. `compute` limits products."""

    def __init__(
        self,
        network: PeerNetwork,
        adverts: Adverts,
        holding: Holding,
        compute: trio.CapacityLimiter,
    ) -> None:
        self.network = network
        self.adverts = adverts
        self.holding = holding
        self.limiter = compute
        self.links = Links()
        self.latency: dict[str, Spread] = {}  # of layers that came to their end, by label

    async def compute(self, batch: LayerRows, account: Account) -> Rows:
        """The experts' unweighted outputs [n, top_k, hidden], in the order of the router.

        Raises `Refused`: EXPERT_UNAVAILABLE or BUSY, with the expert and its block.
        """
        began = trio.current_time()
        outputs = await _Run(self, batch, account).result()
        label = str(batch.layer) if batch.layer < LAYER_LABELS_MAX else BEHIND
        spread = self.latency.setdefault(label, Spread.of("blyan_layer_seconds"))
        spread.observe(trio.current_time() - began)
        return outputs


class _Run:
    """One layer of one request."""

    def __init__(self, layers: Layers, batch: LayerRows, account: Account) -> None:
        self._layers = layers
        self._batch = batch
        self._account = account
        n, hidden = batch.rows.shape
        self._out = np.empty((n, len(batch.experts[0]), hidden), np.float32)
        self._left = n * len(batch.experts[0])
        needs, own = group_rows(batch.experts, batch.blocks), layers.holding.precision
        self._local = [n for n in needs if batch.precision == own and layers.holding.keeps(n.block)]
        self._dispatch = Dispatch(
            [need for need in needs if need not in self._local],
            hidden=hidden,
            holders=self._holders,
            links=layers.links,
        )
        self._patience: dict[Need, float] = {}
        self._put, self._outcomes = trio.open_memory_channel[_Outcome](0)

    def _holders(self, block: BlockId) -> Sequence[PeerId]:
        return self._layers.adverts.holders(block, self._batch.profile)

    async def result(self) -> Rows:
        refused: Refused | None = None
        try:
            async with trio.open_nursery() as nursery:
                if self._local:
                    nursery.start_soon(self._compute_kept, self._local)
                step = self._dispatch.start(trio.current_time())
                while refused is None:
                    self._act(step, nursery)
                    if not self._left:
                        break
                    outcome = await self._next()
                    if isinstance(outcome, Refused):
                        refused = outcome
                    else:
                        step = self._take(outcome)
                nursery.cancel_scope.cancel()
        finally:
            self._dispatch.close()
        if refused is not None:
            raise refused
        return self._out

    def _act(self, step: Step, nursery: trio.Nursery) -> None:
        for send in step.send:
            nursery.start_soon(self._ask, send)
        for event in step.events:
            nursery.start_soon(self._serve_here, event)

    async def _next(self) -> _Outcome | None:
        """What happened next; None if it is only time that passed."""
        wake_at = self._dispatch.wake_at
        with trio.move_on_at(float("inf") if wake_at is None else wake_at):
            return await self._outcomes.receive()
        return None

    def _take(self, outcome: Replied | _Here | _Again | None) -> Step:
        now = trio.current_time()
        match outcome:
            case None:
                return self._dispatch.tick(now)
            case _Again(need):
                return self._dispatch.reopen(need, now)
            case _Here(needs, rows):
                for need, computed in zip(needs, rows, strict=True):
                    self._place(need, computed, self._layers.network.peer_id)
                return Ready()
            case Replied(send, Activated(), rows) if rows is not None:
                self._accept(send, rows, now)
                return Ready()
            case Replied(send, Busy()):
                return self._dispatch.busy(send.ticket, now)
            case Replied(send, NotHeld(blocks)):
                for block in blocks:
                    self._layers.adverts.directory.disown(send.peer, block)
                return self._dispatch.not_held(send.ticket, blocks, now)
            case Replied(send):
                return self._dispatch.failed(send.ticket, now)

    def _accept(self, send: Send, rows: Rows, now: float) -> None:
        served = self._dispatch.answered(send.ticket, now)
        at = 0
        for need in send.needs:
            if need in served:
                self._place(need, rows[at : at + len(need.rows)], send.peer)
            at += len(need.rows)

    def _place(self, need: Need, rows: Rows, peer: PeerId) -> None:
        self._out[list(need.rows), list(need.ranks)] = rows
        self._left -= len(need.rows)
        self._account.computed(self._batch.layer, need.expert, need.block, peer, len(need.rows))

    async def _ask(self, send: Send) -> None:
        network = self._layers.network
        await self._put.send(await ask(network, self._batch, send, self._account))

    async def _compute_kept(self, needs: Sequence[Need]) -> None:
        try:
            rows = await self._compute_here(needs)
        except Refused as error:
            await self._put.send(error)
            return
        if rows is not None:
            await self._put.send(_Here(needs, rows))
            return
        for need in needs:  # dropped a moment ago
            await self._put.send(_Again(need))

    async def _compute_here(self, needs: Sequence[Need]) -> Sequence[Rows] | None:
        """The rows of each need, computed on this node; None if one is not loaded.

        Raises `Refused` as `in_turn` does.
        """
        blocks = [need.block for need in needs]
        with self._layers.holding.use(blocks, self._batch.precision) as held:
            if held is None:
                return None

            def work() -> list[Rows]:
                return [
                    apply_expert(one.expert, self._batch.rows[list(need.rows)])
                    for one, need in zip(held, needs, strict=True)
                ]

            return await in_turn(work, self._layers.limiter)

    async def _serve_here(self, unserved: Unserved) -> None:
        """Loads an expert that nobody is left to compute, or waits a moment for a new holder."""
        need, precision = unserved.need, self._batch.precision
        try:
            rows = None
            while rows is None:
                fetched = await self._layers.holding.load(need.block, precision=precision)
                self._account.fetched_bytes += fetched
                rows = await self._compute_here([need])
            outcome: _Outcome = _Here([need], rows)
        except (Refused, NoRoom) as error:
            if await self._holder_appears(need):
                outcome = _Again(need)
            else:
                outcome = self._unavailable(need, unserved, error)
        await self._put.send(outcome)

    async def _holder_appears(self, need: Need) -> bool:
        """Whether it is worth asking again, after a pause if the same holders are still there."""
        adverts, now = self._layers.adverts, trio.current_time()
        until = self._patience.setdefault(need, now + limits.holder_wait_s_max)
        if now >= until:
            return False
        with trio.move_on_at(until):
            if self._holders(need.block):
                await trio.sleep(limits.holder_retry_s)
                return True
            await adverts.search(self._batch.model)
            while not self._holders(need.block):
                await adverts.changes.wait()
            return True
        return False

    def _unavailable(self, need: Need, unserved: Unserved, error: Exception) -> Refused:
        subject = str(expert_subject(self._batch.layer, need.expert))
        busy = unserved.why == "busy"
        cause = error.refused() if isinstance(error, NoRoom) else error
        return Refused(
            ErrorCode.BUSY if busy else ErrorCode.EXPERT_UNAVAILABLE,
            f"{subject} is not available (block {cid_text(need.block)})",
            f"every holder of the profile {self._batch.profile} is {'busy' if busy else 'gone'},"
            f" and here: {cause}",
            "Try again later, or start a gpu node with room for it.",
            {"expert": subject, "block": cid_text(need.block)},
        )
