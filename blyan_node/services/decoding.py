"""The tokens of one answer, each computed while those before are on their way to whoever asked.

The compute thread goes from token to token by itself for as long as their experts are here. It
comes back where experts are elsewhere, where somebody else waits for the thread or for the experts'
memory, and where whoever takes the tokens falls behind.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from blyan_node.moe.here import Here
from blyan_node.services.compute import refused_if_full
from blyan_node.services.near import Near
from blyan_node.services.session import LAST, Met, Session
from blyan_node.services.visit import Over, Visit
from blyan_node.services.writer import Ends

AHEAD_MAX = 8  # tokens that wait to be taken while a further one is computed

Pass = Callable[[Here], Any]  # to a layer's experts (`Met`), or to the logits [1, vocab]


class Decoding:
    """The tokens of a session, which is within its `room`. For `aclosing`.

    `pick` chooses a token by the logits [vocab] before it, in the compute thread. Nothing is
    computed behind the end of the answer, as far as tokens tell it: with strings that may end it,
    each token waits until the one before was taken.
    """

    def __init__(
        self, session: Session, prompt: Sequence[int], pick: Callable[[Any], int], ends: Ends
    ) -> None:
        self._session, self._prompt, self._pick, self._ends = session, prompt, pick, ends
        self._ahead = 0 if ends.strings else AHEAD_MAX
        self._visit = Visit[int, Met | None](session.limiter)
        self._next: Pass | None = None  # None: the prompt
        self._last = 0

    async def next(self) -> int:
        """The next token. Raises `Refused`, as the session does."""
        if self._next is None:
            self._last = await self._session.first(self._prompt, self._pick)
            self._next = self._following
            return self._last
        while True:
            if not self._visit.under_way:
                await self._visit.start(self._turn(self._next))
            found = await self._visit.take()
            if not isinstance(found, Over):
                self._last = found
                return found
            met = found.result()
            self._next = self._following if met is None else await self._behind(met)

    async def aclose(self) -> None:
        """Waits for the token that is being computed."""
        await self._visit.leave()

    @contextmanager
    def _turn(self, first: Pass) -> Iterator[Callable[[], Met | None]]:
        """What the thread does with the experts that are here; they are in use meanwhile."""
        near = self._session.nearby()
        here = near.begin()

        def run() -> Met | None:
            with refused_if_full():  # here: whoever leaves hears of nothing that is refused
                return self._run(first, near, here)

        try:
            yield run
        finally:
            near.end()

    async def _behind(self, met: Met) -> Pass:
        outputs = await self._session.experts(met)
        return lambda here: self._session.leave(met, outputs, here, LAST)

    def _following(self, here: Here) -> Any:
        return self._session.enter([self._last], here, LAST)

    def _run(self, first: Pass, near: Near, here: Here) -> Met | None:
        """In the compute thread: what experts elsewhere are to compute, or None between tokens."""
        found = first(here)
        while not isinstance(found, Met):
            token = self._pick(found[-1])
            tell = partial(self._visit.tell, token)
            if self._pauses(token, near):
                tell()
                return None
            # Who is told wants the interpreter, which the thread needs until it computes.
            found = self._session.enter([token], here, LAST, tell)
        return found

    def _pauses(self, token: int, near: Near) -> bool:
        """Whether the thread comes back with this token."""
        visit = self._visit
        over = self._ends.reached(token, 2 + visit.told) is not None  # the prompt's is one
        behind = visit.told - visit.taken >= self._ahead
        return over or behind or visit.left or visit.awaited or near.asked or not near.current
