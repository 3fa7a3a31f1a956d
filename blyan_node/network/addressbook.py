"""Whom we know by address, and when to dial whom; no clock, jitter from an injected Random.

What is known of a peer has a rank. *Given* addresses are a person's and never forgotten. *Told*
ones the peer itself said. *Heard* ones somebody else told of it: they may all be lies. So what is
heard displaces nothing that is better known, no teller has more than a share of the book, and a
peer that is known by hearsay alone is forgotten after a few failed dials.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random

from protocols.ids import PeerId
from protocols.limits import (
    dials_unsaid_max,
    hearsay_dials_max,
    hearsay_per_peer_max,
    hello_addrs_max,
    known_peer_s_max,
    known_peers_max,
    mesh_peers_max,
    redial_s,
    redial_s_max,
)


@dataclass
class Entry:
    """One peer. `teller` is who told of it, None once it has been heard itself."""

    teller: PeerId | None = None
    given: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)
    worked: str | None = None  # the address that was dialled last with success
    failures: int = 0
    next_dial: float = 0.0
    why: str | None = None  # why the last dial failed
    said: str | None = None  # the reason that an operator was told last
    reachable_at: float = 0.0  # when it was connected, or when we first heard of it
    up: bool = False

    @property
    def addrs(self) -> list[str]:
        """Where to try it, without `/p2p/`, the most promising first."""
        first = [self.worked] if self.worked else []
        return list(dict.fromkeys([*first, *self.given, *self.told, *self.heard]))

    @property
    def rank(self) -> int:
        """0 for a bootstrap peer, 1 for one that was heard itself, 2 for hearsay."""
        return 0 if self.given else 1 if self.teller is None else 2


class AddressBook:
    """Addresses of peers, with a backoff for each."""

    def __init__(self, own: PeerId, random: Random) -> None:
        self._own = own
        self._random = random
        self._entries: dict[PeerId, Entry] = {}

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._entries

    def addrs(self, peer: PeerId) -> list[str]:
        """Where to try `peer`, the most promising first."""
        entry = self._entries.get(peer)
        return entry.addrs if entry else []

    def vouched(self, peer: PeerId, addr: str) -> bool:
        """Whether a person gave `addr`, or `peer` itself has answered there."""
        entry = self._entries.get(peer)
        return entry is not None and (addr in entry.given or addr == entry.worked)

    def teller(self, peer: PeerId) -> PeerId | None:
        """Who told of `peer`; None if it is known better than by hearsay."""
        entry = self._entries.get(peer)
        return entry.teller if entry and entry.rank == 2 else None

    def bootstrap(self) -> list[tuple[PeerId, str, str | None]]:
        """Each address that a person gave, with its peer and why the last dial failed, if so."""
        entries = self._entries.items()
        return [(peer, addr, entry.why) for peer, entry in entries for addr in entry.given]

    def add_bootstrap(self, peer: PeerId, addr: str) -> None:
        """An address that a person gave: never forgotten."""
        if peer != self._own:
            entry = self._entries.setdefault(peer, Entry())
            entry.given = list(dict.fromkeys([addr, *entry.given]))

    def learn(self, peer: PeerId, addrs: Iterable[str], now: float) -> None:
        """Addresses that `peer` told of itself, or a person of it; makes room in a full book."""
        told = list(dict.fromkeys(addrs))[:hello_addrs_max]
        if peer == self._own or not told:
            return
        entry = self._entries.get(peer)
        if entry is None:
            if len(self._entries) >= known_peers_max and not self._forget_one(None):
                return
            entry = self._entries[peer] = Entry(reachable_at=now)
        entry.teller, entry.told, entry.heard = None, told, []

    def hear(self, peer: PeerId, addrs: Iterable[str], now: float, teller: PeerId) -> None:
        """Addresses that `teller` says `peer` has."""
        heard = list(dict.fromkeys(addrs))[:hello_addrs_max]
        if peer == self._own or not heard:
            return
        entry = self._entries.get(peer)
        if entry is None:
            if sum(e.teller == teller for e in self._entries.values()) >= hearsay_per_peer_max:
                return
            if len(self._entries) >= known_peers_max and not self._forget_one(teller):
                return
            entry = self._entries[peer] = Entry(teller=teller, reachable_at=now)
        entry.heard = list(dict.fromkeys([*entry.heard, *heard]))[:hello_addrs_max]

    def _forget_one(self, teller: PeerId | None) -> bool:
        """Makes room: hearsay of who told most goes first, then who was out of reach longest.

        A new entry by hearsay takes only the place of one by a teller who has more than `teller`.
        """
        told = Counter(e.teller for e in self._entries.values() if e.rank == 2)
        most, count = max(told.items(), key=lambda item: item[1], default=(None, 0))
        if most is not None and (teller is None or count > told[teller]):
            victims = [(p, e) for p, e in self._entries.items() if e.rank == 2 and e.teller == most]
        elif teller is None:
            victims = [(p, e) for p, e in self._entries.items() if e.rank == 1 and not e.up]
        else:
            victims = []
        if victims:
            del self._entries[max(victims, key=lambda v: (v[1].failures, -v[1].reachable_at))[0]]
        return bool(victims)

    def connected(self, peer: PeerId, now: float) -> None:
        """It passed hello: the backoff begins anew when the connection ends."""
        if entry := self._entries.get(peer):
            entry.up = True
            entry.failures = 0
            entry.why = entry.said = None
            entry.reachable_at = now
            entry.next_dial = now

    def worked(self, peer: PeerId, addr: str) -> None:
        """`addr` is the one to try first next time."""
        if entry := self._entries.get(peer):
            entry.worked = addr

    def lost(self, peer: PeerId, now: float) -> None:
        """The connection ended: dial again soon, but not all at the same moment."""
        if entry := self._entries.get(peer):
            entry.up = False
            entry.reachable_at = now
            entry.next_dial = now + redial_s * self._random.uniform(0.2, 1.2)

    def failed(self, peer: PeerId, now: float, why: str = "") -> bool:
        """A dial or its hello failed: wait twice as long as before, up to `redial_s_max`.

        True if it is a bootstrap peer and an operator should hear why: not of the first failures,
        which are usual while several nodes start, and once of each reason.
        """
        news = False
        if entry := self._entries.get(peer):
            entry.why = why
            news = bool(entry.given) and entry.failures >= dials_unsaid_max and entry.said != why
            entry.said = why if news else entry.said
            wait = min(redial_s * 2.0 ** min(entry.failures, 16), redial_s_max)
            entry.failures += 1
            entry.next_dial = now + wait * self._random.uniform(0.5, 1.5)
            if entry.rank < 2:
                entry.heard = []  # another teller may know better
            given_up = entry.rank == 2 and entry.failures >= hearsay_dials_max
            out_of_reach = entry.rank == 1 and now - entry.reachable_at > known_peer_s_max
            if given_up or out_of_reach:
                del self._entries[peer]
        return news

    def refused(self, peer: PeerId, now: float, why: str = "") -> None:
        """It does not belong to us: try a bootstrap peer rarely, forget any other."""
        if (entry := self._entries.get(peer)) is None:
            return
        if entry.given:
            entry.why = why
            entry.next_dial = now + 2 * redial_s_max
        else:
            del self._entries[peer]

    def due(self, now: float, connected: Collection[PeerId]) -> list[PeerId]:
        """Whom to dial now: bootstrap peers always, others up to a full mesh of small swarms."""
        room = mesh_peers_max - len(connected)
        due = [(e.rank, e.failures, p) for p, e in self._absent(connected) if e.next_dial <= now]
        bootstrap = sum(rank == 0 for rank, _, _ in due)
        return [peer for _, _, peer in sorted(due)[: max(room, bootstrap, 0)]]

    def next_due(self, now: float, connected: Collection[PeerId]) -> float | None:
        """When there is more to dial than at `now`; None if there is nothing to come."""
        times = [e.next_dial for _, e in self._absent(connected) if e.next_dial > now]
        return min(times, default=None)

    def _absent(self, connected: Collection[PeerId]) -> Iterator[tuple[PeerId, Entry]]:
        for peer, entry in self._entries.items():
            if peer not in connected and (entry.given or entry.told or entry.heard):
                yield peer, entry
