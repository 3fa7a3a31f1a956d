"""Ed25519 over ids, each use under its own domain tag.

The tag keeps a signature made for one purpose from being valid for another. PyNaCl (libsodium) is
the only verifier: it rejects small-order and non-canonical keys that other libraries accept, and
two nodes must never differ about whether a signature holds.
"""

from dataclasses import dataclass

import nacl.exceptions
import nacl.signing

from protocols.ids import PeerId, PublicKey, peer_id_of

SIGNATURE_BYTES = 64
BLOCK_TAG = b"blyan/block/1"
ADVERT_TAG = b"blyan/advert/1"


@dataclass(frozen=True)
class Identity:
    """A node's or an author's key pair."""

    key: nacl.signing.SigningKey

    @classmethod
    def from_seed(cls, seed: bytes) -> "Identity":
        """The identity of a 32-byte secret seed."""
        return cls(nacl.signing.SigningKey(seed))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes that this identity is made from."""
        return bytes(self.key)

    @property
    def public(self) -> PublicKey:
        """The 32-byte public key."""
        return PublicKey(bytes(self.key.verify_key))

    @property
    def peer_id(self) -> PeerId:
        """The libp2p id of this identity."""
        return peer_id_of(self.public)

    def sign(self, tag: bytes, message: bytes) -> bytes:
        """64 bytes: the signature of `message` under the domain `tag`."""
        return self.key.sign(tag + message).signature


def verify(key: PublicKey, tag: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is `key`'s over `message` under `tag`."""
    try:
        nacl.signing.VerifyKey(key).verify(tag + message, signature)
    except (nacl.exceptions.BadSignatureError, ValueError, TypeError):
        return False
    return True
