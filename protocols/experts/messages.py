"""`/blyan/adverts/1`: a node is asked for its own advert.

Adverts travel by gossip (`adverts` topic, one heartbeat every `limits.advert_heartbeat_s`). A node
that has just met a peer, or found it in the DHT, asks it instead of waiting for the next one. Only
the peer's own advert is given: another's would get a new lifetime with every hand that it passes.
"""

import msgspec

from protocols import limits
from protocols.wire import Messages

PROTOCOL = "/blyan/adverts/1"
MESSAGES = Messages(PROTOCOL)


class AdvertRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What do you hold?"""


class AdvertReply(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A signed advert, fresh."""

    advert: bytes


MESSAGES.register(1, AdvertRequest, bytes_max=16)
MESSAGES.register(2, AdvertReply, bytes_max=limits.advert_bytes_max + 16)
