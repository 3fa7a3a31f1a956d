"""What the RPC's clients have asked for, and what they were refused."""

from collections import Counter
from dataclasses import dataclass, field

from protocols.errors import Refused
from protocols.rpc.table import METHODS


@dataclass
class Tally:
    """Counts of all connections together. What a client made up is not kept."""

    connections: int = 0
    in_flight: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    events_dropped: int = 0

    def asked(self, method: str) -> None:
        """A request for `method` begins."""
        if method in METHODS:
            self.requests[method] += 1

    def refused(self, refused: Refused) -> None:
        """A request is answered with an error."""
        self.errors[refused.code.name] += 1
