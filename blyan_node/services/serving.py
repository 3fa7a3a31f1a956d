"""The worker: computes rows for others with the experts that this node holds.

A request is checked, then waits in a bounded queue; a full queue answers `Busy` at once. One loop
takes what waits, groups it by expert over all requests (a row's bits do not depend on what else is
in the batch) and computes in one thread. A request whose asker is gone or whose time is over is
left out; a product that has begun is never cut off, its reply is dropped.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import trio

from blyan_node.network.interface import PeerNetwork
from blyan_node.services.changes import Changes
from blyan_node.services.compute import Rows, apply_expert, in_turn
from blyan_node.services.held import Held
from blyan_node.services.holding import Holding
from blyan_node.services.spread import Spread
from protocols import limits
from protocols.errors import Refused, RemoteProtocolError
from protocols.forward.messages import (
    MESSAGES,
    PROTOCOL,
    Activate,
    Activated,
    Busy,
    Failed,
    NotHeld,
    Reply,
    check_activate,
)
from protocols.ids import BlockId, PeerId

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One request that waits. `rows` is [rows, hidden]; `deadline` by trio's clock."""

    asked: Activate
    rows: Rows
    deadline: float
    answered: trio.Event = field(default_factory=trio.Event)
    reply: Reply | None = None
    gone: bool = False


class Serving:
    """The queue and the loop that empties it. `compute` is the node's limiter for products."""

    def __init__(
        self,
        network: PeerNetwork,
        holding: Holding,
        profile: str,
        compute: trio.CapacityLimiter,
        *,
        queue_max: int = limits.worker_queue_requests_max,
    ) -> None:
        self.requests = 0
        self.busy = 0
        self.rows = 0
        self.compute_s = 0.0
        self.batch_requests = Spread.of("blyan_worker_batch_requests")
        self.batch_rows = Spread.of("blyan_worker_batch_rows")
        self._holding = holding
        self._profile = profile
        self._compute = compute
        self._queue_max = queue_max
        self._queue: deque[Job] = deque()
        self._changes = Changes()
        network.handle(PROTOCOL, MESSAGES, self._answer)

    @property
    def queue_length(self) -> int:
        """How many requests wait."""
        return len(self._queue)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Computes what waits until cancelled."""
        task_status.started()
        while True:
            if not self._queue:
                await self._changes.wait()
            await self._compute_batch(self._take())

    async def _answer(self, peer: PeerId, message: object) -> Reply:
        if not isinstance(message, Activate):
            raise RemoteProtocolError(PROTOCOL, "not a request")
        check_activate(message)
        self.requests += 1
        if message.profile != self._profile:
            return Failed(f"this node computes with the profile {self._profile}")
        missing = tuple(b for b, _ in message.experts if not self._holding.keeps(b))
        if missing:
            return NotHeld(missing)
        self._check_fits(message)
        if self._full(message):
            self.busy += 1
            return Busy(len(self._queue))
        rows = np.frombuffer(message.data, "<f4").reshape(message.rows, message.hidden)
        job = Job(message, rows, trio.current_time() + message.within_ms / 1000)
        self._queue.append(job)
        self._changes.tell()
        try:
            await job.answered.wait()
        finally:
            job.gone = True
        assert job.reply is not None
        return job.reply

    def _full(self, message: Activate) -> bool:
        """Whether `message` finds no place: too many requests wait, or too many bytes."""
        if len(self._queue) >= self._queue_max:
            return True
        waiting = sum(len(job.asked.data) for job in self._queue)
        return waiting + len(message.data) > limits.worker_queue_bytes_max

    def _check_fits(self, message: Activate) -> None:
        """Whether the experts are of the layer that is named; raises `RemoteProtocolError`."""
        for block, _ in message.experts:
            held = self._holding.get(block)
            assert held is not None
            what = held.what
            if (what.model, what.layer, held.hidden) != (
                message.model,
                message.layer,
                message.hidden,
            ):
                raise RemoteProtocolError(
                    f"{PROTOCOL} Activate", "an expert is not of this model, layer or width"
                )

    def _take(self) -> list[Job]:
        """The next batch: in order of arrival, at least one job, bounded in rows."""
        batch: list[Job] = []
        rows = 0
        now = trio.current_time()
        while self._queue:
            job = self._queue[0]
            if batch and rows + job.asked.rows_out > limits.worker_batch_rows_max:
                break
            self._queue.popleft()
            if job.gone:
                continue
            if job.deadline <= now:
                _settle(job, Failed("the deadline passed while the request waited"))
                continue
            batch.append(job)
            rows += job.asked.rows_out
        return batch

    async def _compute_batch(self, batch: list[Job]) -> None:
        ready = [job for job in batch if not self._lost(job)]
        blocks = sorted({block for job in ready for block, _ in job.asked.experts})
        if not ready:
            return
        with self._holding.use(blocks) as held:
            assert held is not None, "nothing was dropped since `_lost` looked"
            work = _Batch(ready, dict(zip(blocks, held, strict=True)))
            try:
                await in_turn(work.compute, self._compute)
            except Refused as error:  # the askers go on elsewhere, and this node with what follows
                log.warning("%s: %s", error.what, error.why)
                for job in ready:
                    _settle(job, Failed(error.what))
                return
        self._count(ready, work.compute_s)
        for job, reply in zip(ready, work.replies, strict=True):
            _settle(job, reply)

    def _count(self, batch: Sequence[Job], compute_s: float) -> None:
        rows = sum(job.asked.rows_out for job in batch)
        self.rows += rows
        self.compute_s += compute_s
        self.batch_requests.observe(len(batch))
        self.batch_rows.observe(rows)

    def _lost(self, job: Job) -> bool:
        """Answers a job whose expert left while it waited."""
        missing = tuple(b for b, _ in job.asked.experts if not self._holding.keeps(b))
        if missing:
            _settle(job, NotHeld(missing))
        return bool(missing)


def _settle(job: Job, reply: Reply) -> None:
    job.reply = reply
    job.answered.set()


class _Batch:
    """The requests of one turn, computed expert by expert; runs in the compute thread."""

    def __init__(self, jobs: Sequence[Job], held: dict[BlockId, Held]) -> None:
        self._jobs = jobs
        self._held = held
        self.replies: list[Reply] = []
        self.compute_s = 0.0

    def compute(self) -> None:
        """Fills `replies` with each job's rows, in the order that it asked for."""
        outputs: dict[tuple[int, BlockId], Rows] = {}
        for block, held in self._held.items():
            parts = [
                (number, job.rows[list(rows)])
                for number, job in enumerate(self._jobs)
                for wanted, rows in job.asked.experts
                if wanted == block
            ]
            began = time.perf_counter()
            computed = apply_expert(held.expert, np.concatenate([rows for _, rows in parts]))
            spent = time.perf_counter() - began
            held.busy_s += spent
            self.compute_s += spent
            held.calls += len(parts)
            held.rows += len(computed)
            at = 0
            for number, rows in parts:
                outputs[number, block] = computed[at : at + len(rows)]
                at += len(rows)
        self.replies = [
            _reply([outputs[number, block] for block, _ in job.asked.experts])
            for number, job in enumerate(self._jobs)
        ]


def _reply(rows: Sequence[Rows]) -> Reply:
    """The rows of one job. A model can have weights that overflow: who says so does not lie."""
    if all(np.isfinite(one).all() for one in rows):
        return Activated(b"".join(one.tobytes() for one in rows))
    return Failed("a value is not a finite number")
