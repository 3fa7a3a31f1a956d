"""The birth of a network: what all of its nodes must have in common.

The id of a network is the CID of the canonical msgpack of its genesis, `{name, nonce,
parameters}`. Every header carries it, so a block of one network never enters another. People pass
a genesis around as a small JSON file that repeats the id; a file whose id does not fit its content
was edited, and is refused.
"""

import json
import re
from typing import Self

import msgspec

from protocols import wire
from protocols.errors import RemoteProtocolError
from protocols.ids import NetworkId, cid, cid_text

GENESIS_FILE_BYTES_MAX = 16 * 1024
NONCE_BYTES = 16
PARAMETERS_MAX = 64
NETWORK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
PARAMETER_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
PARAMETER_MAX = 2**53 - 1
PRIVATE = "private"
"""A parameter: where it is not 0, a node does not start without the swarm's pre-shared key."""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    id: str
    nonce: str
    parameters: dict[str, int]


class Genesis(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network: `nonce` (16 random bytes) tells two networks of one name apart."""

    name: str
    nonce: bytes
    parameters: dict[str, int] = {}

    @property
    def id(self) -> NetworkId:
        """The network's id: 36 bytes."""
        return NetworkId(cid(wire.encode(self)))

    def check(self) -> Self:
        """The genesis itself; raises `RemoteProtocolError` if a field is out of form."""
        if not NETWORK_NAME.fullmatch(self.name):
            raise RemoteProtocolError("genesis: name", f"{self.name[:80]!r} is not a network name")
        if len(self.nonce) != NONCE_BYTES:
            raise RemoteProtocolError("genesis: nonce", f"{len(self.nonce)} bytes, not 16")
        if len(self.parameters) > PARAMETERS_MAX:
            raise RemoteProtocolError("genesis: parameters", f"{len(self.parameters)} entries")
        for name, value in self.parameters.items():
            if not PARAMETER_NAME.fullmatch(name) or abs(value) > PARAMETER_MAX:
                raise RemoteProtocolError("genesis: parameters", f"{name[:80]!r} is out of form")
        return self

    def to_json(self) -> str:
        """The genesis file: one JSON object, ending in a newline."""
        document = {
            "name": self.name,
            "id": cid_text(self.id),
            "nonce": self.nonce.hex(),
            "parameters": dict(sorted(self.parameters.items())),
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads a genesis file strictly; raises `RemoteProtocolError` for anything amiss."""
        if len(text) > GENESIS_FILE_BYTES_MAX:
            raise RemoteProtocolError("genesis", f"over {GENESIS_FILE_BYTES_MAX} bytes")
        try:
            file = msgspec.json.decode(text, type=_File)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            raise RemoteProtocolError("genesis", str(error)[:200]) from None
        if not re.fullmatch(r"[0-9a-f]{32}", file.nonce):
            raise RemoteProtocolError("genesis: nonce", "not 32 hex digits")
        genesis = cls(file.name, bytes.fromhex(file.nonce), file.parameters).check()
        if cid_text(genesis.id) != file.id:
            raise RemoteProtocolError("genesis: id", "it does not fit the rest of the file")
        return genesis


DEVELOPMENT = Genesis("blyan-development", b"blyan-develop-01", {}).check()
