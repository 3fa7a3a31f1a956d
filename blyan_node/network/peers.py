"""Who is connected and passed hello, and who has misbehaved; no clock and no I/O of its own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from blyan_node.network.interface import Peer
from protocols.hello import Hello, HelloSummary
from protocols.ids import PeerId
from protocols.limits import ban_s, peers_max, score_ban, score_halflife_s

PENALTY_BROKEN_RULE = -20.0
PENALTY_TOO_MANY = -2.0
_RTT_KEPT = 0.75  # weight of what was known before a new measurement


class Scores:
    """Penalties that fade: 0 is a peer that did nothing wrong. `now` in seconds, any clock."""

    def __init__(self) -> None:
        self._scores: dict[PeerId, tuple[float, float]] = {}
        self._banned_until: dict[PeerId, float] = {}

    def score(self, peer: PeerId, now: float) -> float:
        """The score of `peer` at `now`: 0 or less."""
        value, then = self._scores.get(peer, (0.0, now))
        faded: float = value * 2.0 ** ((then - now) / score_halflife_s)
        return faded

    def hurt(self, peer: PeerId, penalty: float, now: float) -> bool:
        """Takes score away; True if this is what got `peer` banned."""
        value = self.score(peer, now) + penalty
        self._scores.pop(peer, None)
        self._scores[peer] = (value, now)
        self._forget_old(now)
        if value > score_ban or self.banned(peer, now):
            return False
        self._banned_until[peer] = now + ban_s
        del self._scores[peer]
        return True

    def banned(self, peer: PeerId, now: float) -> bool:
        """Whether `peer` is to be refused at `now`."""
        return self._banned_until.get(peer, now) > now

    def _forget_old(self, now: float) -> None:
        if len(self._scores) > 4 * peers_max:  # the one that was hurt longest ago
            del self._scores[next(iter(self._scores))]
        for peer in [p for p, until in self._banned_until.items() if until <= now]:
            del self._banned_until[peer]


class PeerTable(Mapping[PeerId, Peer]):
    """The peers that passed hello and are connected."""

    def __init__(self) -> None:
        self._peers: dict[PeerId, Peer] = {}
        self._heard: dict[PeerId, float] = {}
        self._greeted: dict[PeerId, float] = {}

    def __getitem__(self, peer: PeerId) -> Peer:
        return self._peers[peer]

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._peers)

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, peer: PeerId, hello: Hello, *, unix_s: float, now: float) -> Peer | None:
        """Takes in what a hello says; the new peer if it was not here before."""
        known = self._peers.get(peer)
        told = Peer(
            peer_id=peer,
            addrs=tuple(f"{addr}/p2p/{peer}" for addr in hello.addrs),
            role=hello.role,
            profile=hello.profile,
            version=hello.version,
            rtt_ms=known.rtt_ms if known else None,
            since=known.since if known else unix_s,
            score=known.score if known else 0.0,
            summary=hello.summary,
        )
        self._peers[peer] = told
        self._heard[peer] = self._greeted[peer] = now
        return None if known else told

    def greeted(self, peer: PeerId, *, since: float) -> bool:
        """Whether a hello of `peer` was taken in at `since` or later."""
        return self._greeted.get(peer, since - 1) >= since

    def remove(self, peer: PeerId) -> Peer | None:
        """Forgets a peer; what was known of it, if it was here."""
        self._heard.pop(peer, None)
        self._greeted.pop(peer, None)
        return self._peers.pop(peer, None)

    def heard(self, peer: PeerId, now: float, summary: HelloSummary | None = None) -> None:
        """The peer has shown that it is alive."""
        if peer in self._peers:
            self._heard[peer] = now
            if summary is not None:
                self._peers[peer] = replace(self._peers[peer], summary=summary)

    def measured(self, peer: PeerId, rtt_ms: float) -> None:
        """A round trip to `peer` took so long; smoothed."""
        if known := self._peers.get(peer):
            before = known.rtt_ms
            value = rtt_ms if before is None else _RTT_KEPT * before + (1 - _RTT_KEPT) * rtt_ms
            self._peers[peer] = replace(known, rtt_ms=value)

    def scored(self, peer: PeerId, score: float) -> None:
        """Shows a changed score."""
        if known := self._peers.get(peer):
            self._peers[peer] = replace(known, score=score)

    def silent(self, now: float, longer_than_s: float) -> list[PeerId]:
        """The peers that were not heard for so long."""
        return [peer for peer, then in self._heard.items() if now - then > longer_than_s]
