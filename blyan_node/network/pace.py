"""How much gossip is taken from whom, and what was there before; no clock of its own."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from protocols.ids import PeerId
from protocols.limits import (
    gossip_burst_max,
    gossip_bytes_per_token,
    gossip_per_s_max,
    gossip_remembered_max,
    gossip_remembered_s,
    peers_max,
)


@dataclass
class _Bucket:
    tokens: float
    at: float


class Pace:
    """A token bucket for each peer, `gossip_per_s_max` with bursts of `gossip_burst_max`.

    A message takes a token, a large one takes more: one for each `gossip_bytes_per_token` begun.
    """

    def __init__(self) -> None:
        self._buckets: OrderedDict[PeerId, _Bucket] = OrderedDict()

    def allows(self, peer: PeerId, now: float, size: int = 0) -> bool:
        """Takes the tokens for a message of `size` bytes if they are there."""
        bucket = self._buckets.setdefault(peer, _Bucket(gossip_burst_max, now))
        grown = bucket.tokens + (now - bucket.at) * gossip_per_s_max
        bucket.tokens, bucket.at = min(grown, gossip_burst_max), now
        self._buckets.move_to_end(peer)
        while len(self._buckets) > 4 * peers_max:
            self._buckets.popitem(last=False)
        price = 1 + size // gossip_bytes_per_token
        if bucket.tokens < price:
            return False
        bucket.tokens -= price
        return True


class Recent:
    """Remembers hashes for a while, so that the same data published by two peers comes once."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, float] = OrderedDict()

    def is_new(self, topic: str, data: bytes, now: float) -> bool:
        """Whether `data` was not here lately; from now on it was."""
        key = hashlib.sha256(topic.encode() + b"\0" + data).digest()
        while self._seen:
            oldest, then = next(iter(self._seen.items()))
            if now - then < gossip_remembered_s and len(self._seen) < gossip_remembered_max:
                break
            del self._seen[oldest]
        if key in self._seen:
            return False
        self._seen[key] = now
        return True
