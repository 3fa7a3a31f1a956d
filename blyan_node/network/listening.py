"""Where a node listens: checked before libp2p binds, which tells nobody when it fails."""

import socket
from collections.abc import Sequence

from protocols.errors import ErrorCode, Refused


def check_free(addr: str) -> None:
    """Raises `Refused` if something listens there already.

    py-libp2p binds with SO_REUSEPORT: a second daemon on the port would steal half of the first
    one's connections and nobody would be told.
    """
    _, version, host, _, port = addr.split("/")
    family = socket.AF_INET6 if version == "ip6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # as libp2p does: IPv4 on the same port is another's business
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise cannot_listen([addr], error.strerror or str(error)) from None


def cannot_listen(addrs: Sequence[str], why: str) -> Refused:
    """What a person is told."""
    return Refused(
        ErrorCode.BAD_INPUT,
        f"cannot listen on {' '.join(addrs)}",
        why,
        "stop what uses it, or choose another with --listen",
        {"addresses": list(addrs)},
    )
