"""How a request to a peer fails when nobody broke a rule."""

from protocols.errors import Refused
from protocols.ids import PeerId


class PeerGone(Exception):
    """There is no connection to the peer, or it died while the request was under way."""

    def __init__(self, peer: PeerId, why: str) -> None:
        super().__init__(f"peer {peer} is gone: {why}")
        self.peer = peer
        self.why = why


class RequestTimeout(Exception):
    """The peer is connected and has not answered in time; a late reply is dropped."""

    def __init__(self, peer: PeerId, protocol: str, timeout_s: float) -> None:
        super().__init__(f"peer {peer} did not answer on {protocol} within {timeout_s:g} s")
        self.peer = peer
        self.protocol = protocol


class PeerRefused(Exception):
    """The peer understood the request and refuses it; `refused` is what it said."""

    def __init__(self, peer: PeerId, refused: Refused) -> None:
        super().__init__(f"peer {peer} refused: {refused}")
        self.peer = peer
        self.refused = refused
