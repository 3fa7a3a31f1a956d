"""What a protocol core hands its shell, in the order in which the shell must act.

The shell persists first, then sends, then tells its listeners, then sleeps until `wake_at` or the
next event. Because the order is in the type, no shell can send what it has not stored.
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

P = TypeVar("P")
S = TypeVar("S")
E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Ready(Generic[P, S, E]):
    """The effects of one step. `wake_at` is in the clock of the `now` that the core was given."""

    persist: tuple[P, ...] = ()
    send: tuple[S, ...] = ()
    events: tuple[E, ...] = ()
    wake_at: float | None = None
