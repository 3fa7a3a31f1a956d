"""A home router's address translation, in the network namespace that it is started in.

    python -m blyan_node.testing.masquerade INTERFACE

What leaves by INTERFACE gets that interface's address and a port of its own; only answers find
their way back. This is nftables' `masquerade`, told to the kernel over netlink as the program `nft`
tells it, which is not everywhere. Raises `OSError` where the kernel has none, or one may not.
"""

import itertools
import os
import socket
import struct
import sys

_NETFILTER = 12  # NETLINK_NETFILTER
_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEW_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 3, 6
_REQUEST, _ACK, _CREATE = 0x1, 0x4, 0x400
_IPV4, _POSTROUTING, _SOURCE_NAT = 2, 4, 100
_META_OIFNAME, _REGISTER, _EQUAL = 7, 1, 0
_NESTED = 0x8000
_ERROR, _HEADER_BYTES = 2, 16
_TABLE, _CHAIN = b"home\0", b"out\0"


def masquerade(interface: str) -> None:
    """Makes this namespace such a router; it passes on what comes."""
    with open("/proc/sys/net/ipv4/ip_forward", "w") as forward:
        forward.write("1")
    name = interface.encode().ljust(16, b"\0")
    rule = (
        _expression(b"meta\0", _number(1, _REGISTER) + _number(2, _META_OIFNAME)),
        _expression(
            b"cmp\0",
            _number(1, _REGISTER)
            + _number(2, _EQUAL)
            + _attribute(3 | _NESTED, _attribute(1, name)),
        ),
        _expression(b"masq\0", b""),
    )
    hook = _attribute(4 | _NESTED, _number(1, _POSTROUTING) + _number(2, _SOURCE_NAT))
    _tell(
        (_NEW_TABLE, _attribute(1, _TABLE)),
        (
            _NEW_CHAIN,
            _attribute(1, _TABLE) + _attribute(3, _CHAIN) + hook + _attribute(7, b"nat\0"),
        ),
        (
            _NEW_RULE,
            _attribute(1, _TABLE) + _attribute(2, _CHAIN) + _attribute(4 | _NESTED, b"".join(rule)),
        ),
    )


def _tell(*messages: tuple[int, bytes]) -> None:
    """Sends messages of nftables, all or none of which take effect."""
    numbers = itertools.count(1)
    batch = _message(_BATCH_BEGIN, _REQUEST, next(numbers), _family(0, _NFTABLES))
    for kind, attributes in messages:
        flags = _REQUEST | _CREATE | _ACK
        batch += _message(
            _NFTABLES << 8 | kind, flags, next(numbers), _family(_IPV4, 0) + attributes
        )
    batch += _message(_BATCH_END, _REQUEST, next(numbers), _family(0, _NFTABLES))
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as kernel:
        kernel.bind((0, 0))
        kernel.send(batch)
        left = len(messages)
        while left:
            left -= _acknowledged(kernel.recv(65_536))


def _acknowledged(data: bytes) -> int:
    """How many messages an answer of the kernel's accepts; raises what it says otherwise."""
    count = 0
    while data:
        size, kind = struct.unpack_from("=IH", data)
        if kind == _ERROR:
            (error,) = struct.unpack_from("=i", data, _HEADER_BYTES)
            if error:
                raise OSError(-error, os.strerror(-error))
            count += 1
        data = data[-(-size // 4) * 4 :]
    return count


def _message(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", _HEADER_BYTES + len(body), kind, flags, number, 0) + body


def _family(family: int, resource: int) -> bytes:
    return struct.pack("=BBH", family, 0, socket.htons(resource))


def _attribute(kind: int, data: bytes) -> bytes:
    padding = b"\0" * (-len(data) % 4)
    return struct.pack("=HH", 4 + len(data), kind) + data + padding


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value))


def _expression(name: bytes, data: bytes) -> bytes:
    return _attribute(1 | _NESTED, _attribute(1, name) + _attribute(2 | _NESTED, data))


if __name__ == "__main__":
    masquerade(sys.argv[1])
