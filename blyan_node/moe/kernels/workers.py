"""Threads that share one kernel's work by its columns or heads.

Who computes an output changes no bit of it. The threads wait in Python and compute without the GIL.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue

# Below this many products a thread costs more than it computes (a hand-over takes some 20 µs).
_PRODUCTS_MIN = 1 << 19

# Computes the outputs from the first number up to the second.
Part = Callable[[int, int], None]
_Task = tuple[Part, int, int, "SimpleQueue[None]"]


class Workers:
    """`threads` threads in all: the calling one and others, which live as long as this does."""

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        for number in range(1, threads):
            name = f"kernels-{number}"
            threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True).start()

    def share(self, part: Part, outputs: int, products: int, step: int = 1) -> None:
        """Has `outputs` outputs computed, in spans that begin at multiples of `step`.

        `products` says how much work it is. Returns when all is done.
        """
        spans = min(self.threads, outputs // step or 1, max(1, products // _PRODUCTS_MIN))
        if spans == 1:
            part(0, outputs)
            return
        cuts = [outputs * span // spans // step * step for span in range(spans)] + [outputs]
        done: SimpleQueue[None] = SimpleQueue()
        for span in range(1, spans):
            self._tasks.put((part, cuts[span], cuts[span + 1], done))
        part(0, cuts[1])
        for _ in range(1, spans):
            done.get()

    def close(self) -> None:
        """Ends the threads once they have done what was asked of them."""
        for _ in range(1, self.threads):
            self._tasks.put(None)
        self.threads = 1


def _work(tasks: "SimpleQueue[_Task | None]") -> None:
    while (task := tasks.get()) is not None:
        part, first, last, done = task
        part(first, last)
        done.put(None)
