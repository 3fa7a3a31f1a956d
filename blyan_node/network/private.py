"""What a connection begins with: libp2p's greeting, in a private swarm under its key.

A private swarm has a key of 32 bytes, as in libp2p's specification of private networks: each side
sends a nonce of 24 bytes and then only what XSalsa20 makes of it with the key and that nonce.
Noise runs inside. py-libp2p 0.8.1 has a protector too; it uses Salsa20 with a nonce of 8 bytes,
which no other implementation understands, so it is not used.

XSalsa20 alone tells nobody that a key is wrong: the other side reads noise and waits. But whoever
speaks libp2p begins with `/multistream/1.0.0`. So the first bytes are looked at before they are
passed on, and a connection that begins otherwise ends at once, with the reason.
"""

import contextlib
import os
import struct
from typing import Protocol

from Crypto.Cipher import Salsa20
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.transport.exceptions import SecurityUpgradeFailure
from libp2p.transport.upgrader import TransportUpgrader

GREETING = b"\x13/multistream/1.0.0\n"
NONCE_BYTES = 24
_SIGMA = struct.unpack("<4I", b"expand 32-byte k")

DIALLED = {
    True: "the other side does not share this private network's key or is not a Blyan node",
    False: "the other side is a node of a private network (which needs --psk) or is not a Blyan"
    " node",
}
"""What a dialler is told, by whether it has a key."""
WITHOUT_KEY = "it came without a key: it is not in this private network"
WRONG_KEY = "it has another key than this private network, or is no libp2p node"
NO_LIBP2P = "it is a node of a private network, which this one is not, or is no libp2p node"


class NotOurs(SecurityUpgradeFailure):
    """The other side's first bytes are not those of our swarm."""


class Cipher(Protocol):
    """One direction of a protected connection."""

    def encrypt(self, plaintext: bytes) -> bytes:
        """The next bytes for the wire; the same function takes them off it."""


def xsalsa20(key: bytes, nonce: bytes) -> Cipher:
    """The stream cipher for a key of 32 bytes and a nonce of 24, at its beginning.

    XSalsa20 is Salsa20 under the key that HSalsa20 makes of the nonce's first 16 bytes.
    Source: Bernstein, "Extending the Salsa20 nonce", 2011.
    """
    words = struct.unpack("<8I", key) + struct.unpack("<4I", nonce[:16])
    state = _rounds([
        _SIGMA[0], *words[:4], _SIGMA[1], *words[8:], _SIGMA[2], *words[4:8], _SIGMA[3],
    ])  # fmt: skip
    subkey = struct.pack("<8I", *(state[at] for at in (0, 5, 10, 15, 6, 7, 8, 9)))
    cipher: Cipher = Salsa20.new(key=subkey, nonce=nonce[16:])
    return cipher


def _rounds(x: list[int]) -> list[int]:
    """Salsa20's twenty rounds over sixteen words, without the addition that follows them."""
    columns = ((0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11))
    rows = ((0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14))
    for _ in range(10):
        for quarters in (columns, rows):
            for a, b, c, d in quarters:
                for to, one, two, by in ((b, a, d, 7), (c, b, a, 9), (d, c, b, 13), (a, d, c, 18)):
                    total = (x[one] + x[two]) & 0xFFFFFFFF
                    x[to] ^= (total << by | total >> (32 - by)) & 0xFFFFFFFF
    return x


class Doorway(ReadWriteCloser):
    """The bytes of one connection, from the first on; `mismatch` says why they are not ours.

    With a key they are protected. `key` None: they are passed on as they are, after the look at
    the greeting.
    """

    def __init__(self, stream: ReadWriteCloser, key: bytes | None, *, dialled: bool) -> None:
        self.stream = stream
        self.mismatch: str | None = None
        self._key = key
        self._dialled = dialled
        self._ahead: bytes | None = None  # what was read of the greeting; None before that
        self._reading: Cipher | None = None
        self._writing: Cipher | None = None

    async def write(self, data: bytes) -> None:
        """Sends `data`, the first time after our nonce."""
        if self._key is None:
            await self.stream.write(data)
            return
        nonce = b""
        if self._writing is None:
            nonce = os.urandom(NONCE_BYTES)
            self._writing = xsalsa20(self._key, nonce)
        await self.stream.write(nonce + self._writing.encrypt(data))

    async def read(self, n: int | None = None) -> bytes:
        """Up to `n` bytes; raises `NotOurs` if the first ones are no greeting of our swarm."""
        if self._ahead is None:
            self._ahead = await self._greeting()
        if self._ahead:
            size = len(self._ahead) if n is None else n
            first, self._ahead = self._ahead[:size], self._ahead[size:]
            return first
        data = await self.stream.read(n)
        return data if self._reading is None else self._reading.encrypt(data)

    async def _greeting(self) -> bytes:
        first = await self._exactly(len(GREETING))
        if self._key is None:
            return first if first == GREETING else self._refuse(NO_LIBP2P)
        if first == GREETING:
            return self._refuse(WITHOUT_KEY)
        nonce = first + await self._exactly(NONCE_BYTES - len(first))
        self._reading = xsalsa20(self._key, nonce)
        greeting = self._reading.encrypt(await self._exactly(len(GREETING)))
        return greeting if greeting == GREETING else self._refuse(WRONG_KEY)

    async def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await self.stream.read(size - len(data))
            if not part:
                # Some implementations only hang up on who has another key.
                if self._dialled and self._key is not None:
                    self._refuse("")
                raise SecurityUpgradeFailure("the connection ended before a greeting")
            data += part
        return data

    def _refuse(self, why: str) -> bytes:
        self.mismatch = DIALLED[self._key is not None] if self._dialled else why
        raise NotOurs(self.mismatch)

    async def close(self) -> None:
        """Closes the connection."""
        await self.stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The other side's host and port."""
        return self.stream.get_remote_address()


class DoorUpgrader(TransportUpgrader):
    """Puts a `Doorway` before Noise; `key` None for a swarm that is not private."""

    key: bytes | None = None

    async def upgrade_security(
        self, raw_conn: IRawConnection, is_initiator: bool, peer_id: ID | None = None
    ) -> ISecureConn:
        """As the stock one; raises `NotOurs` where the first bytes tell a stranger."""
        assert isinstance(raw_conn, RawConnection)
        _note_address(raw_conn.stream)
        door = raw_conn.stream = Doorway(raw_conn.stream, self.key, dialled=is_initiator)
        try:
            secured = await super().upgrade_security(raw_conn, is_initiator, peer_id)
        except Exception as error:  # py-libp2p's errors share no base; they are passed on
            if door.mismatch is not None:
                raise NotOurs(door.mismatch) from error
            raise
        if self.key is None:
            raw_conn.stream = door.stream  # the greeting has passed: nothing is left to look at
        return secured


def _note_address(stream: ReadWriteCloser) -> None:
    """py-libp2p 0.8.1 takes an address of IPv6, which has four parts, for none."""
    if isinstance(stream, TrioTCPStream) and stream.get_remote_address() is None:
        with contextlib.suppress(OSError):
            host, port, *_ = stream.stream.socket.getpeername()
            stream._cached_remote_address = (host, port)
