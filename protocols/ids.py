"""Names of things: blocks, chunks, peers, subjects and roots.

A block id (and a manifest id) is a CIDv1 with the codec `raw` and a sha2-256 multihash, 36 bytes
in binary and `bafkrei...` in text, so that any CID tool reads it. A chunk is named by its bare
32-byte digest. A peer id is libp2p's text form of an Ed25519 key (an identity multihash in base58).
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Literal, NewType

import base58
import msgspec

from protocols.errors import RemoteProtocolError

BlockId = NewType("BlockId", bytes)  # 36 bytes
ManifestId = NewType("ManifestId", bytes)  # 36 bytes
ChunkHash = NewType("ChunkHash", bytes)  # 32 bytes
NetworkId = NewType("NetworkId", bytes)  # 36 bytes, the id of the genesis
Root = NewType("Root", bytes)  # 32 bytes
PublicKey = NewType("PublicKey", bytes)  # 32 bytes, Ed25519
PeerId = NewType("PeerId", str)  # "12D3KooW..."
Subject = NewType("Subject", str)  # "layer3.expert5"

CID_BYTES = 36
DIGEST_BYTES = 32
_CID_PREFIX = bytes((1, 0x55, 0x12, DIGEST_BYTES))
_PEER_PREFIX = bytes((0x00, 0x24, 0x08, 0x01, 0x12, 0x20))


def cid(data: bytes | memoryview) -> bytes:
    """The CIDv1 (raw, sha2-256) of `data`: 36 bytes."""
    return _CID_PREFIX + hashlib.sha256(data).digest()


def is_cid(value: bytes) -> bool:
    """Whether `value` has the only form of CID that Blyan uses."""
    return len(value) == CID_BYTES and value.startswith(_CID_PREFIX)


def chunk_hash(data: bytes | memoryview) -> ChunkHash:
    """The name of a chunk: sha2-256 of its bytes."""
    return ChunkHash(hashlib.sha256(data).digest())


def cid_text(value: bytes) -> str:
    """A CID as people see it: multibase base32, lower case, 59 characters."""
    return "b" + base64.b32encode(value).decode().lower().rstrip("=")


def parse_cid(text: str) -> bytes:
    """The inverse of `cid_text`; raises `RemoteProtocolError` for anything else."""
    if re.fullmatch(r"b[a-z2-7]{58}", text):
        value = base64.b32decode(text[1:].upper() + "======")
        if is_cid(value) and cid_text(value) == text:
            return value
    raise RemoteProtocolError("id", f"{text[:80]!r} is not a CIDv1 of the form bafkrei...")


def root_text(root: Root) -> str:
    """A root as people see it: 64 hex digits."""
    return root.hex()


def parse_root(text: str) -> Root:
    """The inverse of `root_text`; raises `RemoteProtocolError` for anything else."""
    if re.fullmatch(r"[0-9a-f]{64}", text):
        return Root(bytes.fromhex(text))
    raise RemoteProtocolError("root", f"{text[:80]!r} is not 64 hex digits")


def peer_id_of(key: PublicKey) -> PeerId:
    """The libp2p peer id of an Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_PREFIX + key).decode())


def key_of(peer: str) -> PublicKey:
    """The Ed25519 key inside a peer id; raises `RemoteProtocolError` for other kinds of id."""
    if re.fullmatch(r"[1-9A-HJ-NP-Za-km-z]{46,60}", peer):
        raw = base58.b58decode(peer)
        if len(raw) == len(_PEER_PREFIX) + 32 and raw.startswith(_PEER_PREFIX):
            return PublicKey(raw[len(_PEER_PREFIX) :])
    raise RemoteProtocolError("peer id", f"{peer[:80]!r} is not the id of an Ed25519 key")


SubjectKind = Literal[
    "embed", "attention", "router", "expert", "shared", "mlp", "final", "head", "mtp"
]


class SubjectName(msgspec.Struct, frozen=True):
    """A subject taken apart; `layer` and `expert` are None where the kind has none.

    `mtp` is a layer that predicts further tokens: part of the model, and never computed.
    """

    kind: SubjectKind
    layer: int | None = None
    expert: int | None = None

    @property
    def in_trunk(self) -> bool:
        """Whether a main node computes with it, at every token."""
        return self.expert is None and self.kind != "mtp"

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return f"layer{self.layer}.{self.kind}{'' if self.expert is None else self.expert}"


_NUMBER = r"(0|[1-9][0-9]{0,5})"
_LAYERED = re.compile(rf"layer{_NUMBER}\.(?:(attention|router|shared|mlp|mtp)|expert{_NUMBER})")


def parse_subject(text: str) -> SubjectName:
    """Takes a subject apart; raises `RemoteProtocolError` if it is not one."""
    if text in ("embed", "final", "head"):
        return SubjectName(text)  # type: ignore[arg-type]
    if match := _LAYERED.fullmatch(text):
        layer, kind, expert = match.groups()
        if kind is None:
            return SubjectName("expert", int(layer), int(expert))
        return SubjectName(kind, int(layer))  # type: ignore[arg-type]
    raise RemoteProtocolError("subject", f"{text[:80]!r} names no part of a model")


def expert_subject(layer: int, expert: int) -> Subject:
    """The subject of one routed expert."""
    return Subject(f"layer{layer}.expert{expert}")


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """The Merkle tree head of RFC 6962 (sha2-256, leaves and nodes tagged 0x00 and 0x01)."""
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    if not level:
        return hashlib.sha256(b"").digest()
    while len(level) > 1:
        paired = [
            hashlib.sha256(b"\1" + level[i] + level[i + 1]).digest()
            for i in range(0, len(level) - 1, 2)
        ]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def model_root(model: BlockId, heads: Mapping[Subject, BlockId]) -> Root:
    """The root that names a model's every weight: over its id and (subject, head) in order."""
    leaves = (subject.encode() + b"\0" + heads[subject] for subject in sorted(heads))
    return Root(merkle_root((bytes(model), *leaves)))
