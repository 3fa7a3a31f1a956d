"""Runs a fetch plan: asks peers as it says, and tells it what became of each request."""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import PeerNetwork
from blyan_node.services.changes import Changes
from protocols.errors import Refused, RemoteProtocolError
from protocols.ids import PeerId
from protocols.sync.plan import Assignment, FetchPlan

K = TypeVar("K", bound=bytes)


@dataclass(frozen=True, slots=True)
class Answer(Generic[K]):
    """What a peer brought of what it was asked for, and what it does not have."""

    arrived: Iterable[K]
    absent: Iterable[K]


class NobodyHas(Exception):
    """No connected peer has, or gives, what is wanted."""

    def __init__(self, keys: Iterable[bytes]) -> None:
        self.keys = tuple(keys)
        super().__init__(f"no connected peer has {len(self.keys)} of what is wanted")


class Asking(Generic[K]):
    """One run of a plan over the network.

    `ask` sends one request, keeps what came, and says what that was. `peers` names who may be
    asked now, the preferred ones with True; it is called again before each decision.
    """

    def __init__(
        self,
        network: PeerNetwork,
        plan: FetchPlan[K],
        ask: Callable[[Assignment[K]], Awaitable[Answer[K]]],
        peers: Callable[[], Iterable[tuple[PeerId, bool]]],
    ) -> None:
        self._network = network
        self._plan = plan
        self._ask = ask
        self._peers = peers
        self._changes = Changes()
        self._under_way = 0
        self._refused: Refused | None = None

    async def run(self) -> None:
        """Returns when nothing is wanted any more.

        Raises `NobodyHas`, or what `ask` raised of `Refused` (a full disk). Peers that are gone or
        slow are replaced, and what lied is penalised.
        """
        stuck: list[K] = []
        async with trio.open_nursery() as nursery:
            while not self._plan.done and self._refused is None and not stuck:
                seen, now = self._changes.count, trio.current_time()
                self._renew_peers()
                for assignment in self._plan.next(now):
                    self._under_way += 1
                    nursery.start_soon(self._one, assignment)
                if not self._under_way:
                    stuck = self._plan.stuck()
                if not stuck:
                    await self._wait(seen, now)
            nursery.cancel_scope.cancel()  # what is still asked for has come from another peer
        if self._refused is not None:
            raise self._refused
        if stuck:
            raise NobodyHas(stuck)

    async def _wait(self, seen: int, now: float) -> None:
        wake_at = self._plan.wake_at(now)
        with trio.move_on_at(float("inf") if wake_at is None else wake_at):
            await self._changes.wait(seen)

    def _renew_peers(self) -> None:
        for peer, preferred in self._peers():
            self._plan.add_peer(peer, preferred=preferred)

    async def _one(self, assignment: Assignment[K]) -> None:
        peer = assignment.peer
        try:
            answer = await self._ask(assignment)
        except (PeerGone, RequestTimeout, PeerRefused):
            self._plan.failed(assignment, trio.current_time())
            if peer not in self._network.peers:
                self._plan.drop_peer(peer)  # it may come back, and is asked again then
        except RemoteProtocolError as error:
            self._network.penalise(peer, error)
            self._plan.corrupt(assignment)
        except Refused as refused:
            self._refused = refused
        else:
            self._plan.arrived(assignment, answer.arrived)
            self._plan.answered(assignment, answer.absent)
        self._under_way -= 1
        self._changes.tell()
