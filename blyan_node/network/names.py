"""Names in addresses, looked up as everything else on this machine looks them up."""

import socket

import trio

_FAMILIES = {
    "dns": socket.AF_UNSPEC,
    "dns4": socket.AF_INET,
    "dns6": socket.AF_INET6,
}


async def resolved(addr: str) -> list[str]:
    """`/dns4/HOST/tcp/PORT` with each address of HOST in its place; another address as it is.

    The system's resolver knows more than a name server does: the hosts file, and names that
    machines at home tell each other (mDNS). Raises `OSError` for a name that it does not know.
    """
    _, kind, host, rest = addr.split("/", 3)
    if kind not in _FAMILIES:
        return [addr]
    found = await trio.socket.getaddrinfo(
        host, None, family=_FAMILIES[kind], type=socket.SOCK_STREAM
    )
    versions = {socket.AF_INET: 4, socket.AF_INET6: 6}
    plain = [f"/ip{versions[family]}/{place[0]}/{rest}" for family, _, _, _, place in found]
    return list(dict.fromkeys(plain))
