"""The memory that the operator gives (`--memory`), who takes of it, and who lets go for whom.

Weights count with their stored bytes, which lie in mapped files; caches of sessions with all that
they may grow to. Everything is taken before it is loaded, so the budget holds at every moment. What
a running request uses is never let go. Whoever keeps something that could be let go registers
itself as a lender of a sort; for a need, the sorts are asked in their order, up to the last one
that the need is worth.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from blyan_node.services.changes import Changes
from protocols.errors import ErrorCode, Refused


class Sort(IntEnum):
    """What can be let go, the cheapest first."""

    PASSING = 1  # experts that were loaded because a request needed them
    IDLE = 2  # trunks without a session
    PLACED = 3  # experts that placement keeps here: others may count on them


Lend = Callable[[int], None]
"""Lets go of what nobody uses, the longest unused first, until so many bytes are free."""


@dataclass
class Memory:
    """The budget in bytes, and what is taken of it.

    `copied` counts what loading copied so far; `copying` tells of it.
    """

    budget: int
    experts: int = 0
    trunks: int = 0
    caches: int = 0
    copied: int = 0
    copying: Changes = field(default_factory=Changes)
    _lenders: dict[Sort, Lend] = field(default_factory=dict)

    @property
    def free(self) -> int:
        """Bytes that nothing takes."""
        return self.budget - self.experts - self.trunks - self.caches

    def copies(self, size: int) -> None:
        """Counts what loading has copied."""
        self.copied += size
        if size > 0:
            self.copying.tell()

    def lender(self, sort: Sort, lend: Lend) -> None:
        """Registers who lets go of what is of this sort."""
        self._lenders[sort] = lend

    def make_room(self, size: int, upto: Sort) -> bool:
        """Lets go of what is of a sort up to `upto` until `size` bytes are free; whether they are.

        Nothing is let go for what can never fit.
        """
        if size > self.budget:
            return False
        for sort, lend in sorted(self._lenders.items()):
            if self.free < size and sort <= upto:
                lend(size)
        return self.free >= size

    @contextmanager
    def cache(self, size: int) -> Iterator[None]:
        """`size` bytes for the cache of one session. Raises `Refused`: NOT_ALLOWED, BUSY."""
        if not self.make_room(size, Sort.PLACED):
            others = self.caches > 0 and size <= self.free + self.caches
            raise Refused(
                ErrorCode.BUSY if others else ErrorCode.NOT_ALLOWED,
                "this request does not fit into the node's memory",
                f"its cache may take {size} bytes; of {self.budget} (--memory) {self.free} are free"
                + (", and other requests use the rest" if others else ""),
                "Try again when they have ended, or ask for fewer tokens."
                if others
                else "Ask for fewer tokens, or start the node with a larger --memory.",
                {"bytes": size, "free": self.free, "memory": self.budget},
            )
        self.caches += size
        try:
            yield
        finally:
            self.caches -= size


@dataclass(frozen=True)
class Resident:
    """What the system counts of this process: `anonymous` is its own, `file` of mapped files."""

    anonymous: int
    file: int


def resident() -> Resident | None:
    """The process's memory in bytes; None where the system does not say (it is not Linux)."""
    try:
        with open(f"/proc/{os.getpid()}/status") as status:
            rows = dict(line.split(":", 1) for line in status)
        return Resident(*(int(rows[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")))
    except (OSError, KeyError, ValueError):
        return None
