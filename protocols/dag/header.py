"""The block: a small signed header that names everything else by hash.

A header is a canonical msgpack map. Its id is the CID of those bytes, so the id covers every field;
the signature is over the id and travels beside the header, outside the id: a header has one id
whoever relays it. A block's body is a manifest (`protocols.tensors.manifest`) and the chunks that
the manifest names; neither is in the header, whose size is bounded (`limits.header_bytes_max`).
"""

from enum import StrEnum
from typing import Self

import msgspec

from protocols import limits, wire
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ManifestId, NetworkId, PublicKey, Subject, cid
from protocols.signing import BLOCK_TAG, SIGNATURE_BYTES, Identity, verify

HEADER_VERSION = 1


class Chain(StrEnum):
    """Which chain a block is in: A holds models and releases, B parameters."""

    A = "A"
    B = "B"


class Kind(StrEnum):
    """What a block is."""

    MODEL = "model"
    RELEASE = "release"
    TRUNK = "trunk"
    ROUTER = "router"
    EXPERT = "expert"


CHAIN_OF = {
    Kind.MODEL: Chain.A,
    Kind.RELEASE: Chain.A,
    Kind.TRUNK: Chain.B,
    Kind.ROUTER: Chain.B,
    Kind.EXPERT: Chain.B,
}


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    """The fields that a block's id covers.

    `seq` counts the author's blocks; `time` is in ms since 1970; `depends_on` is sorted and without
    repeats; `model` is None for a model block alone; `subject` is set for parameters; `base` is the
    head that an update (or the release that a later release) replaces; `size` is the body's length
    in bytes. `meta` is small and by kind: `name` of a model, `staged` (1) on a block that takes
    effect only when an accepted release lists it.
    """

    v: int = HEADER_VERSION
    net: NetworkId
    chain: Chain
    kind: Kind
    author: PublicKey
    seq: int
    time: int
    depends_on: tuple[BlockId, ...] = ()
    model: BlockId | None = None
    subject: Subject | None = None
    base: BlockId | None = None
    body: ManifestId | None = None
    size: int = 0
    meta: dict[str, str | int] = {}


class _Signed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    header: bytes
    sig: bytes


class Block(msgspec.Struct, frozen=True, gc=False):
    """A header with its id, its canonical bytes and its signature (not yet verified)."""

    id: BlockId
    header: Header
    raw: bytes
    sig: bytes

    @classmethod
    def create(cls, header: Header, author: Identity) -> Self:
        """Encodes and signs `header`; the author's key must be the one that the header names."""
        assert header.author == author.public
        raw = wire.encode(header)
        if len(raw) > limits.header_bytes_max:
            raise RemoteProtocolError("header", f"{len(raw)} bytes, too many for a header")
        block_id = BlockId(cid(raw))
        return cls(block_id, header, raw, author.sign(BLOCK_TAG, block_id))

    @classmethod
    def decode(cls, data: bytes | memoryview) -> Self:
        """Reads the wire form [header bytes, signature]; raises `RemoteProtocolError`."""
        signed = wire.decode_signed(
            bytes(data), _Signed, where="block", bytes_max=limits.signed_header_bytes_max
        )
        if len(signed.sig) != SIGNATURE_BYTES:
            raise RemoteProtocolError("block", f"signature of {len(signed.sig)} bytes")
        header = wire.decode_signed(
            signed.header, Header, where="header", bytes_max=limits.header_bytes_max
        )
        return cls(BlockId(cid(signed.header)), header, signed.header, signed.sig)

    def encode(self) -> bytes:
        """The wire and disk form: canonical msgpack of [header bytes, signature]."""
        return wire.encode(_Signed(self.raw, self.sig))

    def signature_holds(self) -> bool:
        """Whether the header's author signed this id."""
        return verify(self.header.author, BLOCK_TAG, self.id, self.sig)
