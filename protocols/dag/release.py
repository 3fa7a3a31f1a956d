"""The body of a release: the block of every subject of a model.

A release is what makes a publish visible: its body lists subject → block id for the whole model,
as canonical msgpack in one `U8` tensor called `release`. The blocks that it lists take effect
together with it, or not at all.
"""

from collections.abc import Mapping

from protocols import limits, wire
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, Subject, is_cid, parse_subject
from protocols.tensors.manifest import Dtype, Manifest, TensorEntry

ENTRY = "release"


def encode_release(subjects: Mapping[Subject, BlockId]) -> bytes:
    """The bytes of a release body."""
    return wire.encode(dict(subjects))


def decode_release(data: bytes | memoryview) -> dict[Subject, BlockId]:
    """Reads a release body strictly; raises `RemoteProtocolError`."""
    listed = wire.decode_signed(
        bytes(data), dict[str, bytes], where="release body", bytes_max=limits.release_body_bytes_max
    )
    if not 0 < len(listed) <= limits.release_subjects_max:
        raise RemoteProtocolError("release body", f"{len(listed)} subjects")
    for subject, id in listed.items():
        parse_subject(subject)
        if not is_cid(id):
            raise RemoteProtocolError("release body", f"{subject}: not a block id")
    return {Subject(subject): BlockId(id) for subject, id in listed.items()}


def release_entry(manifest: Manifest) -> TensorEntry:
    """The one entry of a release's manifest; raises `RemoteProtocolError` if it is another."""
    if len(manifest.tensors) != 1:
        raise RemoteProtocolError("release body", f"{len(manifest.tensors)} tensors, not one")
    entry = manifest.tensors[0]
    if entry.name != ENTRY or entry.dtype is not Dtype.U8 or len(entry.shape) != 1:
        raise RemoteProtocolError("release body", f"{entry.name[:80]!r} is not `{ENTRY}` as U8")
    if entry.size > limits.release_body_bytes_max:
        raise RemoteProtocolError("release body", f"{entry.size} bytes")
    return entry
