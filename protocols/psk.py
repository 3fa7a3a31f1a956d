"""The key of a private swarm, and the file in which people keep it.

The format is libp2p's own, so that one file serves other implementations as well:

    /key/swarm/psk/1.0.0/
    /base16/
    64 hex digits

Others may also have written `/base64/`. Whoever has the key may talk to the swarm's nodes; it does
not say who somebody is, which is Noise's business.
"""

import base64
import binascii
import hashlib
import re

from protocols.errors import RemoteProtocolError

KEY_BYTES = 32
FILE_BYTES_MAX = 256
HEADER = "/key/swarm/psk/1.0.0/"
_FINGERPRINT_DOMAIN = b"blyan/psk-fingerprint/1"


def parse_psk(data: bytes) -> bytes:
    """The 32 bytes of a key file's content; raises `RemoteProtocolError` saying what is amiss."""
    if len(data) > FILE_BYTES_MAX:
        raise RemoteProtocolError("psk", f"over {FILE_BYTES_MAX} bytes")
    try:
        lines = data.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise RemoteProtocolError("psk", "not a text") from None
    if len(lines) != 3 or lines[0] != HEADER:
        raise RemoteProtocolError("psk", f"its first of three lines is not {HEADER}")
    try:
        key = _DECODERS[lines[1]](lines[2])
    except KeyError:
        raise RemoteProtocolError("psk", "its second line is not /base16/ or /base64/") from None
    except (ValueError, binascii.Error):
        raise RemoteProtocolError("psk", f"its third line is not {lines[1].strip('/')}") from None
    if len(key) != KEY_BYTES:
        raise RemoteProtocolError("psk", f"a key of {len(key)} bytes, not {KEY_BYTES}")
    return key


def psk_text(key: bytes) -> str:
    """The content of a key file."""
    return f"{HEADER}\n/base16/\n{key.hex()}\n"


def fingerprint(key: bytes) -> str:
    """16 hex digits by which people see whether two nodes have one key; they tell nothing of it."""
    return hashlib.sha256(_FINGERPRINT_DOMAIN + key).hexdigest()[:16]


def _base16(text: str) -> bytes:
    if not re.fullmatch(r"(?:[0-9a-fA-F]{2})*", text):
        raise ValueError
    return bytes.fromhex(text)


def _base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


_DECODERS = {"/base16/": _base16, "/base64/": _base64}
