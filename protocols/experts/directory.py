"""The directory: who holds what, as far as this node has heard.

It is made of adverts, the newest of each peer, and forgets each after its lifetime by the clock of
the `now` that it is given. Sequence numbers outlive the adverts, so that an old one that is still
going around cannot bring back a peer that has withdrawn, expired or hung up.

Anybody can make keys and sign adverts with them, so what is kept is bounded in adverts and in
experts, and where room is short the peers of this node go before those that it only hears of.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from protocols import limits
from protocols.experts.advert import Advert, HeldExpert
from protocols.ids import BlockId, PeerId


class Directory:
    """The newest live advert of each peer, indexed by block. `near` says who is no stranger."""

    def __init__(self, near: Callable[[PeerId], bool] = lambda peer: True) -> None:
        self._near = near
        self._experts = 0  # in all adverts
        self._adverts: dict[PeerId, tuple[Advert, float]] = {}
        self._seqs: dict[PeerId, int] = {}
        self._holders: dict[BlockId, dict[PeerId, HeldExpert]] = {}

    def apply(self, advert: Advert, now: float) -> bool:
        """Takes a verified advert; False if it is not newer than what is known, or has no room."""
        peer = advert.peer
        if advert.seq <= self._seqs.get(peer, 0):
            return False
        self._make_room(advert, now)
        if not self._fits(advert):
            return False
        self.remove(peer)
        self._remember(peer, advert.seq)
        if not advert.withdrawn:
            self._adverts[peer] = (advert, now + advert.lifetime_s)
            self._experts += advert.experts
            for held in advert.held():
                self._holders.setdefault(held.block, {})[peer] = held
        return True

    def remove(self, peer: PeerId) -> bool:
        """Forgets what `peer` holds until its next advert; whether there was anything."""
        entry = self._adverts.pop(peer, None)
        if entry is None:
            return False
        self._experts -= entry[0].experts
        for held in entry[0].held():
            self.disown(peer, held.block)
        return True

    def disown(self, peer: PeerId, block: BlockId) -> None:
        """`peer` says itself that it does not hold `block`: so it is until its next advert."""
        holders = self._holders.get(block, {})
        holders.pop(peer, None)
        if not holders:
            self._holders.pop(block, None)

    def expire(self, now: float) -> list[PeerId]:
        """Forgets adverts whose lifetime is over and says whose."""
        gone = [peer for peer, (_, until) in self._adverts.items() if until <= now]
        for peer in gone:
            self.remove(peer)
        return gone

    def held(self, peer: PeerId) -> frozenset[HeldExpert]:
        """What `peer` holds."""
        advert = self.advert(peer)
        said = advert.held() if advert else ()
        return frozenset(held for held in said if peer in self._holders.get(held.block, ()))

    def holders(self, block: BlockId) -> Sequence[PeerId]:
        """The peers that hold `block`, in the order of their ids."""
        return sorted(self._holders.get(block, ()))

    def adverts(self) -> Mapping[PeerId, Advert]:
        """The live adverts."""
        return {peer: advert for peer, (advert, _) in self._adverts.items()}

    def advert(self, peer: PeerId) -> Advert | None:
        """The live advert of `peer`."""
        entry = self._adverts.get(peer)
        return entry[0] if entry else None

    def experts(
        self, model: BlockId | None = None
    ) -> Iterator[tuple[HeldExpert, Sequence[PeerId]]]:
        """The experts that are advertised, with who does, in order; those of one model if named."""
        found: dict[HeldExpert, list[PeerId]] = {}
        for peers in self._holders.values():
            for peer, held in peers.items():
                if model is None or held.model == model:
                    found.setdefault(held, []).append(peer)
        for held in sorted(found):
            yield held, sorted(found[held])

    def _make_room(self, advert: Advert, now: float) -> None:
        """Forgets what is over and, for a peer that is near, what strangers hold, oldest first."""
        if self._fits(advert):
            return
        self.expire(now)
        if not self._near(advert.peer):
            return
        for stranger in [p for p in self._adverts if p != advert.peer and not self._near(p)]:
            if self._fits(advert):
                return
            self.remove(stranger)

    def _fits(self, advert: Advert) -> bool:
        """Whether there is room for `advert` instead of its peer's earlier one."""
        entry = self._adverts.get(advert.peer)
        others = len(self._adverts) - (entry is not None)
        experts = self._experts - (entry[0].experts if entry else 0)
        return (
            others < limits.adverts_max
            and experts + advert.experts <= limits.advertised_experts_max
        )

    def _remember(self, peer: PeerId, seq: int) -> None:
        self._seqs.pop(peer, None)
        self._seqs[peer] = seq
        while len(self._seqs) > limits.advert_sequences_max:
            del self._seqs[next(iter(self._seqs))]
