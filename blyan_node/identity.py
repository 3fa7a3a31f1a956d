"""Secrets on disk, in files that only their owner may read.

The node's key pair is 32 secret bytes as hex; a private swarm's key has libp2p's format.
"""

import os
import re
import stat
from pathlib import Path

from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.psk import parse_psk
from protocols.signing import Identity

SEED_BYTES = 32
FILE_BYTES_MAX = 256


def create_identity(path: Path) -> Identity:
    """Makes a new key pair in a new file of mode 0600; an existing file is never overwritten."""
    identity = Identity.from_seed(os.urandom(SEED_BYTES))
    write_secret(path, identity.seed.hex() + "\n")
    return identity


def write_secret(path: Path, text: str) -> None:
    """Writes a new file of mode 0600; raises `Refused` if there is one."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        raise Refused(
            ErrorCode.CONFLICT,
            f"{path} exists",
            "a key is never overwritten",
            "move it away if it is not needed any more",
            {"path": str(path)},
        ) from None
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def load_identity(path: Path) -> Identity:
    """Reads the key pair; raises `Refused` if others may read it, `RemoteProtocolError` if bad."""
    try:
        return parse_seed(_secret(path, "this node's secret key").decode())
    except UnicodeDecodeError:
        raise RemoteProtocolError(str(path), "not a text of 64 hex digits") from None
    except RemoteProtocolError as error:
        raise RemoteProtocolError(str(path), error.why) from None


def load_psk(path: Path) -> bytes:
    """Reads a private swarm's key; raises as `load_identity`, and `Refused` if it is not there."""
    try:
        return parse_psk(_secret(path, "this private swarm's key"))
    except FileNotFoundError:
        raise Refused(
            ErrorCode.NOT_FOUND,
            f"there is no {path}",
            "it is to hold the key of the private swarm",
            "copy it from another node of the swarm, or leave out `psk`",
            {"path": str(path)},
        ) from None
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{path}: {error.where}", error.why) from None


def _secret(path: Path, what: str) -> bytes:
    """What a file holds that only its owner may read; raises `Refused` if others may, too."""
    with path.open("rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise Refused(
                ErrorCode.NOT_ALLOWED,
                f"{path} is not private",
                f"others may read {what}",
                f"chmod 600 {path}",
                {"path": str(path)},
            )
        return file.read(FILE_BYTES_MAX + 1)


def parse_seed(text: str) -> Identity:
    """The key pair of a key file's text; raises `RemoteProtocolError`."""
    if not re.fullmatch(r"[0-9a-f]{64}\n?", text):
        raise RemoteProtocolError("identity key", "not 64 hex digits")
    return Identity.from_seed(bytes.fromhex(text.strip()))
