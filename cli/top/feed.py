"""Keeps what is seen of a node current: polls, its events, and who holds what when that changes."""

import time
from collections.abc import Callable
from typing import Any

from cli.top.link import Link
from cli.top.seen import POLLED, Seen
from protocols.errors import Refused
from protocols.rpc.codec import Note, Reply

HOLDERS_EVERY_S = 2.0
_MOVES_HOLDERS = ("experts", "release", "update", "dropped")


class Feed:
    """Sends requests on `link` and takes in what comes. `now` is a clock that only goes forward."""

    def __init__(self, link: Link, now: Callable[[], float] = time.monotonic) -> None:
        self.seen = Seen()
        self._link = link
        self._now = now
        self._asked: dict[int, tuple[str, str]] = {}  # id → method, and the model it is about
        self._coming: dict[str, Any] = {}
        self._holders_at: float | None = None
        self._moved = True

    @property
    def waiting(self) -> bool:
        """Whether the answers of a poll are still to come."""
        return any(method in POLLED for method, _ in self._asked.values())

    def subscribe(self) -> None:
        """Has the node send its events. Raises `NoNode`."""
        self._ask("events.subscribe")

    def poll(self) -> None:
        """Asks everything anew, unless the last poll is not answered yet. Raises `NoNode`."""
        if not self.waiting:
            self._coming = {}
            for method in POLLED:
                self._ask(method)

    def take(self) -> bool:
        """Takes in what has come; whether a poll is complete with it.

        Raises `NoNode` when the node is gone, `Refused` with what it refuses.
        """
        complete = False
        for message in self._link.take():
            if isinstance(message, Note):
                self._note(message)
            else:
                complete |= self._reply(message)
        return complete

    def settle(self) -> None:
        """Waits until everything that was asked, but for events, is answered."""
        while any(method != "events.subscribe" for method, _ in self._asked.values()):
            self.take()

    def _ask(self, method: str, model: str = "") -> None:
        params = {"model": model} if model else {}
        self._asked[self._link.send(method, params)] = (method, model)

    def _note(self, note: Note) -> None:
        if note.method == "event":
            self.seen.events.append(note.params)
            self._moved |= note.params["event"] in _MOVES_HOLDERS

    def _reply(self, reply: Reply) -> bool:
        method, model = (
            self._asked.pop(reply.id, ("", "")) if isinstance(reply.id, int) else ("", "")
        )
        if reply.refused is not None:
            self._refused(method, reply.refused)
        elif method == "expert.list":
            self.seen.held(model, reply.result["experts"])
        elif method in POLLED:
            self._coming[method] = reply.result
            if len(self._coming) == len(POLLED):
                self.seen.polled(self._coming, self._now())
                self._look_for_holders()
                return True
        return False

    def _refused(self, method: str, refused: Refused) -> None:
        if method != "expert.list":  # its model may have gone meanwhile
            raise refused

    def _look_for_holders(self) -> None:
        """Asks who holds the experts, if that may have changed; seldom, as answers are large."""
        now = self._now()
        due = self._holders_at is None or now >= self._holders_at + HOLDERS_EVERY_S
        if self._moved and due:
            self._moved, self._holders_at = False, now
            for model in self.seen.models:
                self._ask("expert.list", model["model"])
