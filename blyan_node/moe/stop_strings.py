"""Stop strings: where an answer's text ends, found while the text comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string; that and what follows it is never passed on.

    Text that may be the beginning of one is withheld until more is known. The first is the one
    that ends first (of two that end together the longer), so how the text was cut changes nothing.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What may be passed on now that `text` has come."""
        if self.found:
            return ""
        self._held += text
        places = [(self._held.find(one), one) for one in self._strings]
        ends = [(at + len(one), at) for at, one in places if at >= 0]
        if ends:
            self.found = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - max(map(self._overlap, self._strings), default=0))

    def finish(self) -> str:
        """What was withheld, when no more text comes."""
        return "" if self.found else self._release(len(self._held))

    def _overlap(self, string: str) -> int:
        """How many characters at the end may be the beginning of `string`."""
        longest = min(len(string) - 1, len(self._held))
        found = (n for n in range(longest, 0, -1) if self._held.endswith(string[:n]))
        return next(found, 0)

    def _release(self, count: int) -> str:
        passed, self._held = self._held[:count], self._held[count:]
        return passed
