"""The node's key pair on disk: 32 secret bytes as hex in a file that only its owner may read."""

import os
import re
import stat
from pathlib import Path

from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.signing import Identity

SEED_BYTES = 32
FILE_BYTES_MAX = 256


def create_identity(path: Path) -> Identity:
    """Makes a new key pair in a new file of mode 0600; an existing file is never overwritten."""
    identity = Identity.from_seed(os.urandom(SEED_BYTES))
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
        file.write(identity.seed.hex() + "\n")
        file.flush()
        os.fsync(file.fileno())
    return identity


def load_identity(path: Path) -> Identity:
    """Reads the key pair; raises `Refused` if others may read it, `RemoteProtocolError` if bad."""
    with path.open() as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise Refused(
                ErrorCode.NOT_ALLOWED,
                f"{path} is not private",
                "others may read this node's secret key",
                f"chmod 600 {path}",
                {"path": str(path)},
            )
        try:
            return parse_seed(file.read(FILE_BYTES_MAX + 1))
        except UnicodeDecodeError:
            raise RemoteProtocolError("identity key", "not a text of 64 hex digits") from None


def parse_seed(text: str) -> Identity:
    """The key pair of a key file's text; raises `RemoteProtocolError`."""
    if not re.fullmatch(r"[0-9a-f]{64}\n?", text):
        raise RemoteProtocolError("identity key", "not 64 hex digits")
    return Identity.from_seed(bytes.fromhex(text.strip()))
