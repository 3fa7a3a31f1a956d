"""What passes on the streams of our own protocols: by protocol, and by peer while it is here."""

from collections import Counter
from dataclasses import dataclass, field

from protocols.ids import PeerId
from protocols.limits import peers_max


@dataclass(slots=True)
class Traffic:
    """Bytes both ways, requests both ways, and why requests of ours failed."""

    bytes_in: int = 0
    bytes_out: int = 0
    requests_in: int = 0
    requests_out: int = 0
    failures: Counter[str] = field(default_factory=Counter)


Meters = tuple[Traffic, ...]
"""Everything in which the same bytes are counted."""


@dataclass
class Ledger:
    """The traffic of a node. `protocols` has the protocols that it speaks, and no others."""

    protocols: dict[str, Traffic] = field(default_factory=dict)
    peers: dict[PeerId, Traffic] = field(default_factory=dict)

    def meters(self, peer: PeerId, protocol: str) -> Meters:
        """What a stream with `peer` is counted in."""
        return self.protocol(protocol), self._peer(peer)

    def protocol(self, name: str) -> Traffic:
        """What one of our protocols has moved."""
        return self.protocols.setdefault(name, Traffic())

    def left(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone; the next is counted from 0."""
        self.peers.pop(peer, None)

    def _peer(self, peer: PeerId) -> Traffic:
        if peer not in self.peers and len(self.peers) >= peers_max:
            del self.peers[next(iter(self.peers))]
        return self.peers.setdefault(peer, Traffic())
