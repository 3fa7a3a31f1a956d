"""Whom we know by address, and when to dial whom; no clock, jitter from an injected Random."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from random import Random

from protocols.ids import PeerId
from protocols.limits import (
    hello_addrs_max,
    known_peer_s_max,
    known_peers_max,
    mesh_peers_max,
    redial_s,
    redial_s_max,
)


@dataclass
class Entry:
    """One peer's addresses (without `/p2p/`), the one that worked last first."""

    addrs: list[str] = field(default_factory=list)
    bootstrap: bool = False
    failures: int = 0
    next_dial: float = 0.0
    reachable_at: float = 0.0  # when it was connected, or when we first heard of it


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
        return list(entry.addrs) if entry else []

    def add_bootstrap(self, peer: PeerId, addr: str) -> None:
        """An address that a person gave: never forgotten."""
        if peer != self._own:
            entry = self._entries.setdefault(peer, Entry())
            entry.bootstrap = True
            entry.addrs = list(dict.fromkeys([addr, *entry.addrs]))

    def learn(self, peer: PeerId, addrs: Iterable[str], now: float) -> None:
        """Addresses that a peer told, of itself or of others; full books learn no new peers."""
        addrs = list(addrs)
        if peer == self._own or not addrs:
            return
        entry = self._entries.get(peer)
        if entry is None:
            if len(self._entries) >= known_peers_max:
                return
            entry = self._entries[peer] = Entry(reachable_at=now)
        elif not set(addrs) <= set(entry.addrs):
            entry.next_dial = min(entry.next_dial, now + redial_s)  # a new address: a new chance
        kept = entry.addrs[:hello_addrs_max] if entry.bootstrap else entry.addrs[:1]
        entry.addrs = list(dict.fromkeys([*kept, *addrs]))[: 2 * hello_addrs_max]

    def connected(self, peer: PeerId, now: float) -> None:
        """There is a connection: the backoff begins anew when it ends."""
        if entry := self._entries.get(peer):
            entry.failures = 0
            entry.reachable_at = now
            entry.next_dial = now

    def worked(self, peer: PeerId, addr: str) -> None:
        """`addr` is the one to try first next time."""
        if entry := self._entries.get(peer):
            entry.addrs = list(dict.fromkeys([addr, *entry.addrs]))

    def lost(self, peer: PeerId, now: float) -> None:
        """The connection ended: dial again soon, but not all at the same moment."""
        if entry := self._entries.get(peer):
            entry.reachable_at = now
            entry.next_dial = now + redial_s * self._random.uniform(0.2, 1.2)

    def failed(self, peer: PeerId, now: float) -> None:
        """A dial failed: wait twice as long as before, up to `redial_s_max`."""
        if entry := self._entries.get(peer):
            wait = min(redial_s * 2.0 ** min(entry.failures, 16), redial_s_max)
            entry.failures += 1
            entry.next_dial = now + wait * self._random.uniform(0.5, 1.5)
            if not entry.bootstrap and now - entry.reachable_at > known_peer_s_max:
                del self._entries[peer]

    def refused(self, peer: PeerId, now: float) -> None:
        """It does not belong to us: try a bootstrap peer rarely, forget any other."""
        if (entry := self._entries.get(peer)) is None:
            return
        if entry.bootstrap:
            entry.next_dial = now + 2 * redial_s_max
        else:
            del self._entries[peer]

    def due(self, now: float, connected: Collection[PeerId]) -> list[PeerId]:
        """Whom to dial now: bootstrap peers always, others up to a full mesh of small swarms."""
        room = mesh_peers_max - len(connected)
        due = [
            peer
            for peer, entry in self._entries.items()
            if peer not in connected and entry.next_dial <= now and entry.addrs
        ]
        due.sort(key=lambda peer: (not self._entries[peer].bootstrap, peer))
        bootstrap = [peer for peer in due if self._entries[peer].bootstrap]
        return due[: max(room, len(bootstrap), 0)]

    def next_due(self, connected: Collection[PeerId]) -> float | None:
        """When `due` may have more than now; None if nobody is left to dial."""
        times = [e.next_dial for p, e in self._entries.items() if p not in connected and e.addrs]
        return min(times, default=None)
