"""Multiaddrs: which to tell others, which to dial."""

import ipaddress
import re
import time
from collections.abc import Iterable, Sequence

from multiaddr.utils import get_network_addrs

from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import PeerId, key_of
from protocols.limits import addr_bytes_max, hello_addrs_max

_INTERFACES_EVERY_S = 10
_NAMES = ("dns", "dns4", "dns6")
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?"


def split_peer(text: str) -> tuple[str, PeerId]:
    """`/ip4/.../tcp/1/p2p/ID` as ("/ip4/.../tcp/1", ID); raises `RemoteProtocolError`."""
    addr, slash, peer = text.rpartition("/p2p/")
    if not slash:
        raise RemoteProtocolError("address", f"{text[:200]!r} does not end in /p2p/ID")
    key_of(peer)
    if not dialable(addr):
        raise RemoteProtocolError("address", f"{text[:200]!r} is no TCP address")
    return addr, PeerId(peer)


def parse_bootstrap(text: str) -> tuple[str, PeerId]:
    """As `split_peer`, for what a person has typed: raises `Refused`."""
    try:
        return split_peer(text)
    except RemoteProtocolError as error:
        raise Refused(
            ErrorCode.BAD_INPUT,
            "not an address to start from",
            error.why,
            "give a multiaddr such as /ip4/192.0.2.7/tcp/4040/p2p/12D3KooW..., as `id` shows it",
            {"address": text[:200]},
        ) from None


def parse_listen(text: str) -> str:
    """An address to listen on, `/ip4|ip6/ADDRESS/tcp/PORT`; raises `Refused`."""
    try:
        host, port = _host_and_port(text)
        plain = f"/ip{ipaddress.ip_address(host).version}/{host}/tcp/{port}"
    except ValueError:
        plain, port = "", 0
    if not text or text != plain or not 0 <= port < 65536:
        raise Refused(
            ErrorCode.BAD_INPUT,
            "not an address to listen on",
            f"{text[:200]!r} is no multiaddr of an IP address and a TCP port",
            "for example /ip4/0.0.0.0/tcp/4040",
            {"address": text[:200]},
        )
    return text


def dialable(text: str) -> bool:
    """Whether this is a TCP address, with a host and a port that one can dial."""
    parts = text.split("/")
    if len(text.encode()) > addr_bytes_max or len(parts) != 5 or parts[0] or parts[3] != "tcp":
        return False
    _, kind, host, _, port = parts
    if not re.fullmatch(r"[1-9][0-9]{0,4}", port) or int(port) > 65535:
        return False
    if kind in _NAMES:
        return re.fullmatch(_NAME, host) is not None
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    if ip.version == 6 and (ip.ipv4_mapped is not None or "%" in host):
        return False  # IPv4 in disguise, and what means something on one interface alone
    return kind == f"ip{ip.version}" and not (ip.is_unspecified or ip.is_multicast)


def dialable_ones(addrs: Iterable[str], *, from_here: bool = True) -> list[str]:
    """The dialable ones of what a peer says, once each, at most `hello_addrs_max`.

    Loopback and link-local addresses mean another machine to a peer than to us, so they count only
    `from_here`: from a peer on this machine.
    """
    found = [addr for addr in dict.fromkeys(addrs) if dialable(addr)]
    return [addr for addr in found if from_here or leads_away(addr)][:hello_addrs_max]


def leads_away(addr: str) -> bool:
    """Whether a dialable address is none that every machine and every link has; a name may be."""
    kind, host = addr.split("/")[1:3]
    if kind in _NAMES:
        return True
    ip = ipaddress.ip_address(host)
    return not (ip.is_loopback or ip.is_link_local)


def is_name(addr: str) -> bool:
    """Whether a dialable address names its host."""
    return addr.split("/")[1] in _NAMES


def is_own(host: str) -> bool:
    """Whether an IP address is one of this machine; "" is none."""
    if not host:
        return False
    ip = ipaddress.ip_address(host.partition("%")[0])
    return ip.is_loopback or str(ip) in get_network_addrs(ip.version)


class Announced:
    """`announced` for the host, which asks often; the interfaces are looked at now and then."""

    def __init__(self, announce: Sequence[str]) -> None:
        self._announce = announce
        self._known: tuple[Sequence[str], list[str]] = ((), [])
        self._look_again = 0.0

    def __call__(self, listening: Sequence[str]) -> list[str]:
        """The addresses to tell others, given those that the sockets listen on."""
        now = time.monotonic()  # asked for the first time before trio runs
        if now >= self._look_again or self._known[0] != listening:
            self._known = (listening, announced(listening, self._announce))
            self._look_again = now + _INTERFACES_EVERY_S
        return list(self._known[1])


def announced(listening: Sequence[str], announce: Sequence[str]) -> list[str]:
    """What to tell others: `announce` if there is any, else where the sockets really are.

    A socket on all interfaces stands for each interface's address; the loopback is told only by a
    node that has nothing else, or that listens on it alone.
    """
    if announce:
        return [addr.partition("/p2p/")[0] for addr in announce][:hello_addrs_max]
    found: list[str] = []
    for addr in listening:
        host, port = _host_and_port(addr)
        if not ipaddress.ip_address(host).is_unspecified:
            found.append(addr)
            continue
        version = 6 if ":" in host else 4
        loopback = "::1" if version == 6 else "127.0.0.1"
        places = [f"/ip{version}/{h}/tcp/{port}" for h in get_network_addrs(version)]
        away = [place for place in dialable_ones(places) if leads_away(place)]
        found += away or [f"/ip{version}/{loopback}/tcp/{port}"]
    return dialable_ones(found)


def _host_and_port(addr: str) -> tuple[str, int]:
    _, _, host, _, port = addr.split("/")[:5]
    return host, int(port)
