"""Telling others that something has changed, without saying what."""

import trio


class Changes:
    """A condition that any number of tasks wait for; a change between two waits is not missed."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self.count = 0

    def tell(self) -> None:
        """Wakes everybody who waits."""
        self.count += 1
        self._event.set()
        self._event = trio.Event()

    async def wait(self, seen: int | None = None) -> int:
        """Waits until there has been a change after change number `seen` (default: after now)."""
        if seen is None or seen == self.count:
            await self._event.wait()
        return self.count
