"""How a node looks from outside, `/blyan/reach/1`: who asks is told, and dialled if it wishes.

Participants: an asker that wants to know whether others can reach it, and any peer of its.
Goals: the address under which the asker is seen, whether it answers at the addresses that it tells
others, and what time it is at the peer.
Non-goals: opening ports, and keeping a verdict: what one peer sees, another may not.

Sequence: `Look` → `Seen`. The peer dials only addresses of the host that it sees the asker at, so
nobody can have it knock at others' doors; where none of those named is such a one, it tries that
host at the port of the first name or address of the same kind (IPv4, IPv6). A dial counts when the
asker has proved its peer id over Noise.

Limits: `reach_addrs_max` addresses, `reach_dial_s_max` a dial and as long to look up names; within
`reach_every_s` one request of a peer and `reach_per_host_max` of all peers at one host, who could
else have its ports tried one after the other. Whoever asks more often is refused as too busy.
"""

import ipaddress

import msgspec

from protocols.errors import RemoteProtocolError
from protocols.limits import addr_bytes_max, reach_addrs_max
from protocols.wire import Messages

PROTOCOL = "/blyan/reach/1"
_WHY_CHARS_MAX = 300


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """`addrs` without `/p2p/`; empty to be told of address and time alone."""

    addrs: list[str]


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """One dial; `why` it failed, empty if it did not."""

    addr: str
    why: str


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """`host` is the asker's IP address as seen here, `time_ms` the peer's clock, ms since 1970."""

    host: str
    time_ms: int
    tried: list[Tried]


MESSAGES = Messages(PROTOCOL)
MESSAGES.register(1, Look, bytes_max=4 * 1024)
MESSAGES.register(2, Seen, bytes_max=16 * 1024)


def check_look(look: Look) -> None:
    """Raises `RemoteProtocolError` for a request that breaks the limits above."""
    if len(look.addrs) > reach_addrs_max:
        raise RemoteProtocolError("reach", f"{len(look.addrs)} addresses")
    if any(len(addr.encode()) > addr_bytes_max for addr in look.addrs):
        raise RemoteProtocolError("reach", "an address that is too long")


def check_seen(seen: Seen) -> None:
    """Raises `RemoteProtocolError` for a reply that breaks them, or cannot be shown to people."""
    if len(seen.tried) > reach_addrs_max or not 0 <= seen.time_ms < 2**53:
        raise RemoteProtocolError("reach", "a reply out of range")
    if any(len(one.why) > _WHY_CHARS_MAX or not one.why.isprintable() for one in seen.tried):
        raise RemoteProtocolError("reach", "a text that is too long or has control characters")
    if seen.host and _prefix(seen.host) is None:
        raise RemoteProtocolError("reach", "a host that is no IP address")
    if any(not _is_at(seen.host, one.addr) for one in seen.tried):
        raise RemoteProtocolError("reach", "a dial at another host than the one it names")


def _is_at(host: str, addr: str) -> bool:
    before, _, port = addr.rpartition("/")
    return before == _prefix(host) and port.isascii() and port.isdigit() and len(port) <= 5


def _prefix(host: str) -> str | None:
    """An address at `host` up to its port; None if `host` is no IP address, or one of a link."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return None
    return None if "%" in host else f"/ip{ip.version}/{host}/tcp"
