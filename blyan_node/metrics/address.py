"""Where metrics are shown: `127.0.0.1:9464`, and only with the word `public:` to other machines."""

import re
from dataclasses import dataclass
from ipaddress import ip_address

from protocols.errors import RemoteProtocolError

PUBLIC = "public:"
_ADDRESS = re.compile(r"(?:(\d{1,3}(?:\.\d{1,3}){3})|\[([0-9a-fA-F:.]{2,45})\]):(\d{1,5})")


@dataclass(frozen=True)
class MetricsAddress:
    """An IP address and a port; 0 is any free one."""

    host: str
    port: int


def parse_metrics_address(text: str) -> MetricsAddress:
    """Reads `IP:PORT` or `public:IP:PORT`; raises `RemoteProtocolError`.

    An address that other machines can reach needs `public:` before it: everybody who reaches it may
    read what the node does.
    """
    public = text.startswith(PUBLIC)
    match = _ADDRESS.fullmatch(text.removeprefix(PUBLIC))
    try:
        host = ip_address(match[1] or match[2]) if match else None
    except ValueError:
        host = None
    if match is None or host is None or int(match[3]) > 65_535:
        raise RemoteProtocolError(
            "metrics", f"{text[:80]!r} is no address of the form 127.0.0.1:9464"
        )
    if not host.is_loopback and not public:
        raise RemoteProtocolError(
            "metrics",
            f"{host} can be reached from other machines; use 127.0.0.1, or write {PUBLIC}{text}"
            " if everybody who reaches it may read what this node does",
        )
    return MetricsAddress(str(host), int(match[3]))
