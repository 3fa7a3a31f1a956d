"""What two nodes say first on every connection, `/blyan/hello/1`.

Participants: the dialler and the listener of one connection, both of whom run Blyan.
Goals: agree on the network and on the version of the protocols before anything else is said; tell
role, numeric profile, how much of the chain is here, and where this node and its peers listen, so
that a node that was given one address finds the others.
Non-goals: authentication (Noise has done it), catching up (`/blyan/sync/1` does it).

Sequence: the dialler opens a stream and sends its `Hello`; the listener answers with its own. Each
side judges the other's with `judge`; where they do not fit, each logs why in one line and the
connection is closed. Later the same stream carries a pair of `Still` every `still_every_s`, by
which round trip and log length stay fresh and a dead link is noticed. A further pair of hellos
follows every `hello_every_s`, and when the two count different numbers of peers.

Limits: `hello_bytes_max` a message, `hello_addrs_max` addresses of one node, `hello_peers_max`
peers told about. An address longer than `addr_bytes_max` is malformed.
"""

import msgspec

from protocols.errors import RemoteProtocolError
from protocols.ids import CID_BYTES, NetworkId, PeerId, key_of
from protocols.limits import (
    addr_bytes_max,
    hello_addrs_max,
    hello_bytes_max,
    hello_peers_max,
    hello_text_bytes_max,
)
from protocols.wire import Messages

PROTOCOL = "/blyan/hello/1"
PROTOCOL_VERSION = 1
ROLES = ("main", "gpu")


class HelloSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How much of the chain a node has: the 16-byte id of its log, and the log's length."""

    log_id: bytes = bytes(16)
    log_length: int = 0


class KnownPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A peer of the speaker, for peer exchange."""

    peer_id: str
    addrs: list[str]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Who speaks, where it listens, and whom it knows. `addrs` carry no `/p2p/` part."""

    protocol_version: int
    network: bytes
    network_name: str
    version: str
    role: str
    profile: str
    summary: HelloSummary
    addrs: list[str]
    peers: list[KnownPeer]


class Still(msgspec.Struct, frozen=True, kw_only=True):
    """A sign of life; `rtt_us` is the round trip that its sender measured last, 0 if none.

    `peers` counts the sender's peers: where the two counts differ, one of them may know somebody
    whom the other does not, and the dialler sends a hello next.
    """

    summary: HelloSummary
    rtt_us: int
    peers: int


MESSAGES = Messages(PROTOCOL)
MESSAGES.register(1, Hello, bytes_max=hello_bytes_max)
MESSAGES.register(2, Still, bytes_max=1024)


def check(hello: Hello) -> None:
    """Raises `RemoteProtocolError` for a hello that breaks the limits above."""
    texts = (hello.network_name, hello.version, hello.role, hello.profile)
    if any(len(text.encode()) > hello_text_bytes_max for text in texts):
        raise RemoteProtocolError("hello", f"a text of over {hello_text_bytes_max} bytes")
    if not all(text.isprintable() for text in texts):
        raise RemoteProtocolError("hello", "a text with control characters")
    if hello.role not in ROLES:
        raise RemoteProtocolError("hello", f"unknown role {hello.role!r}")
    if len(hello.network) != CID_BYTES:
        raise RemoteProtocolError("hello", "the network id is no CID")
    if len(hello.summary.log_id) != 16 or not 0 <= hello.summary.log_length < 2**63:
        raise RemoteProtocolError("hello", "the log summary is out of range")
    if len(hello.peers) > hello_peers_max:
        raise RemoteProtocolError("hello", f"{len(hello.peers)} peers, at most {hello_peers_max}")
    for peer in hello.peers:
        key_of(peer.peer_id)
    for addrs in (hello.addrs, *(peer.addrs for peer in hello.peers)):
        if len(addrs) > hello_addrs_max:
            raise RemoteProtocolError("hello", f"{len(addrs)} addresses, at most {hello_addrs_max}")
        if any(not a.startswith("/") or len(a.encode()) > addr_bytes_max for a in addrs):
            raise RemoteProtocolError("hello", "an address that is none, or too long")
        if not all(a.isprintable() for a in addrs):
            raise RemoteProtocolError("hello", "an address with control characters")


def judge(ours: Hello, theirs: Hello) -> str | None:
    """Why these two nodes do not belong together, in words for both logs; None if they do."""
    if theirs.protocol_version != ours.protocol_version:
        return (
            f"speaks protocol version {theirs.protocol_version} (release {theirs.version}), "
            f"we speak {ours.protocol_version} (release {ours.version}): update the older one"
        )
    if theirs.network != ours.network:
        return (
            f"belongs to network {theirs.network_name!r} ({network_text(theirs.network)}), "
            f"we to {ours.network_name!r} ({network_text(ours.network)}): "
            "start both with the same --network file"
        )
    return None


def network_text(network: bytes) -> str:
    """A network id short enough for a log line."""
    return network[4:10].hex()


def hello_of(
    network: NetworkId,
    name: str,
    *,
    version: str,
    role: str,
    profile: str,
    summary: HelloSummary,
    addrs: list[str],
    peers: list[tuple[PeerId, list[str]]],
) -> Hello:
    """Our own hello, with addresses and peers cut to the limits."""
    return Hello(
        protocol_version=PROTOCOL_VERSION,
        network=network,
        network_name=name,
        version=version,
        role=role,
        profile=profile,
        summary=summary,
        addrs=addrs[:hello_addrs_max],
        peers=[
            KnownPeer(peer_id=peer, addrs=known[:hello_addrs_max])
            for peer, known in peers[:hello_peers_max]
        ],
    )
