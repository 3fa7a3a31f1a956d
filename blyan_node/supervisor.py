"""What the process's supervisor is told, in systemd's words.

The protocol is sd_notify(3): datagrams of `NAME=value` lines to the socket that `NOTIFY_SOCKET`
names. Whoever started us and set no such variable is told nothing. The watchdog is fed by the event
loop itself: a loop that hangs starves it, and the supervisor starts the node anew.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import trio

STATUS_EVERY_S = 5.0


@dataclass(frozen=True)
class Supervisor:
    """The other end of a notify socket; `watchdog_s` is None if nobody watches."""

    address: str
    watchdog_s: float | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Self | None:
        """The supervisor that the environment names, if there is one."""
        address = environment.get("NOTIFY_SOCKET", "")
        if not address.startswith(("/", "@")):
            return None
        watched = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        every = environment.get("WATCHDOG_USEC", "")
        return cls(address, int(every) / 1e6 if watched and every.isdecimal() else None)

    def tell(self, **said: object) -> None:
        """Sends one datagram; a supervisor that is gone or does not read is no reason to end."""
        lines = "".join(f"{name}={value}\n" for name, value in said.items())
        address = "\0" + self.address[1:] if self.address.startswith("@") else self.address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as link:
                link.setblocking(False)
                link.sendto(lines.encode(), address)
        except OSError:
            pass

    def ready(self, status: str) -> None:
        """The node serves."""
        self.tell(READY=1, STATUS=status)

    def reloading(self) -> None:
        """The node reads its configuration again; `ready` ends it."""
        self.tell(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def stopping(self) -> None:
        """The node drains."""
        self.tell(STOPPING=1, STATUS="draining")

    async def report(self, status: Callable[[], str]) -> None:
        """Feeds the watchdog twice as often as it asks, and tells the status; never ends."""
        every = STATUS_EVERY_S
        if self.watchdog_s is not None:
            every = min(every, self.watchdog_s / 2)
        while True:
            self.tell(WATCHDOG=1, STATUS=status())
            await trio.sleep(every)
