"""A cable with delay, loss and a firewall, in user space, between two interfaces of a namespace.

    python -m blyan_node.testing.wire cable NEAR FAR --delay-ms 20 --loss 0.01 [--no-dial-in]
    python -m blyan_node.testing.wire plain INTERFACE

`cable` passes Ethernet frames between NEAR and FAR until it is ended, each way with the delay and
the loss that it is told (`tc netem` does this in the kernel, where the kernel has it). With
`--no-dial-in`, segments that would open a TCP connection towards NEAR are dropped, as a home
router does it. `plain` has an interface compute its checksums and cut its segments itself, without
which a frame that is copied is no valid one.
"""

import argparse
import ctypes
import fcntl
import heapq
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

_SIOCETHTOOL = 0x8946
_OFFLOADS = (0x17, 0x1F, 0x24, 0x19)  # ETHTOOL_STXCSUM, _STSO, _SGSO, _SSG
_ETH_P_ALL = 3
_OUTGOING = 4  # PACKET_OUTGOING: what we have sent ourselves
_FRAME_BYTES_MAX = 65_536
_SYN, _ACK, _TCP, _IPV4 = 0x02, 0x10, 6, 0x0800


def plain(interface: str) -> None:
    """Turns off what the kernel leaves to a network card."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as link:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(link, _SIOCETHTOOL, request)


def opens_tcp(frame: bytes) -> bool:
    """Whether an Ethernet frame is the first segment of a TCP connection over IPv4."""
    if len(frame) < 54 or int.from_bytes(frame[12:14]) != _IPV4 or frame[23] != _TCP:
        return False
    flags = frame[14 + 4 * (frame[14] & 15) + 13]
    return flags & (_SYN | _ACK) == _SYN


@dataclass
class Cable:
    """What happens to frames; `now` in seconds. The same seed loses the same frames."""

    delay_s: float
    loss: float
    dial_in: bool
    random: random.Random
    _under_way: list[tuple[float, int, bool, bytes]] = field(default_factory=list)
    _count: int = 0

    def take(self, now: float, towards_near: bool, frame: bytes) -> None:
        """A frame enters at one end."""
        if self.random.random() < self.loss:
            return
        if towards_near and not self.dial_in and opens_tcp(frame):
            return
        self._count += 1
        heapq.heappush(self._under_way, (now + self.delay_s, self._count, towards_near, frame))

    def out(self, now: float) -> Iterator[tuple[bool, bytes]]:
        """The frames that leave by `now`, in the order in which they entered."""
        while self._under_way and self._under_way[0][0] <= now:
            _, _, towards_near, frame = heapq.heappop(self._under_way)
            yield towards_near, frame

    def wait_s(self, now: float) -> float | None:
        """How long nothing leaves; None: until something enters."""
        return max(0.0, self._under_way[0][0] - now) if self._under_way else None


def run(near: str, far: str, cable: Cable) -> None:
    """Passes frames for ever."""
    ends = {False: _tap(near), True: _tap(far)}  # by the direction in which its frames go
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([*ends.values()], [], [], cable.wait_s(time.monotonic()))
        for towards_near, end in ends.items():
            if end in ready:
                with suppress(OSError):  # the interface is down: somebody has pulled the cable
                    frame, (_, _, kind, *_) = end.recvfrom(_FRAME_BYTES_MAX)
                    if kind != _OUTGOING:
                        cable.take(time.monotonic(), towards_near, frame)
        for towards_near, frame in cable.out(time.monotonic()):
            with suppress(OSError):
                ends[not towards_near].send(frame)


def _tap(interface: str) -> socket.socket:
    tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    tap.bind((interface, 0))
    return tap


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("plain").add_argument("interface")
    cable = verbs.add_parser("cable")
    cable.add_argument("near")
    cable.add_argument("far")
    cable.add_argument("--delay-ms", type=float, default=0.0)
    cable.add_argument("--loss", type=float, default=0.0)
    cable.add_argument("--seed", type=int, default=1)
    cable.add_argument("--no-dial-in", action="store_true")
    given = parser.parse_args()
    if given.verb == "plain":
        plain(given.interface)
        return
    dice = random.Random(given.seed)
    run(given.near, given.far,
        Cable(given.delay_ms / 1000, given.loss, not given.no_dial_in, dice))  # fmt: skip


if __name__ == "__main__":
    main()
