"""What nodes ask each other about blocks and chunks.

Participants: an asker and an answerer; every request has one reply, in any order. Goals: a node
that was away catches up on all that it missed from whoever is there; nothing that a peer says is
taken on trust, because every item has its hash in the question. Non-goals: finding peers, and
telling of new blocks as they come (gossip does that; this is what makes gossip a mere hint).

`/blyan/sync/1`

    LogRequest(after, limit)  → LogPage      ids in the answerer's own order of acceptance
    BlocksRequest(ids)        → Blocks       signed headers
    ManifestsRequest(ids)     → Manifests    canonical manifests

`/blyan/chunks/1`

    ChunksRequest(hashes)     → Chunks       in the order asked; None for what is not here

A log is numbered from 1 without gaps and only grows, under a random `log_id` that a store keeps for
its life; a cursor means something for one `log_id` alone. Parents come before children in it. A
reply holds as much as fits: an id that is neither in `blocks` nor in `missing` is asked for again.
"""

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from protocols import limits
from protocols.dag.header import Block
from protocols.dag.validate import decode_blocks
from protocols.errors import RemoteProtocolError
from protocols.ids import (
    DIGEST_BYTES,
    BlockId,
    ChunkHash,
    ManifestId,
    NetworkId,
    chunk_hash,
    cid,
    is_cid,
)
from protocols.tensors.manifest import Manifest
from protocols.wire import Messages

SYNC_PROTOCOL = "/blyan/sync/1"
CHUNKS_PROTOCOL = "/blyan/chunks/1"
LOG_ID_BYTES = 16
REPLY_BYTES_MAX = limits.message_bytes_max - 64 * limits.KIB  # items of a reply, without its frame


class LogRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The ids behind number `after`, at most `limit`; 0 asks for `log_id` and `end` alone."""

    after: int
    limit: int


class LogPage(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`ids` have the numbers after+1 … next; `end` is the last number of the whole log."""

    log_id: bytes
    ids: list[bytes]
    next: int
    end: int


class BlocksRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Headers by id, at most `limits.sync_headers_max`."""

    ids: list[bytes]


class Blocks(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Signed headers in the order asked, and the ids of those that are not here."""

    blocks: list[bytes]
    missing: list[bytes]


class ManifestsRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Manifests by id, at most `limits.sync_manifests_max`."""

    ids: list[bytes]


class Manifests(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Manifests in the order asked, and the ids of those that are not here."""

    manifests: list[bytes]
    missing: list[bytes]


class ChunksRequest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Chunks by hash, at most `limits.chunks_per_request_max`."""

    hashes: list[bytes]


class Chunks(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One entry for each hash asked."""

    data: list[bytes | None]


SYNC = Messages(SYNC_PROTOCOL)
SYNC.register(1, LogRequest, bytes_max=64)
SYNC.register(2, LogPage, bytes_max=64 * limits.sync_page_ids_max)
SYNC.register(3, BlocksRequest, bytes_max=64 * limits.sync_headers_max)
SYNC.register(4, Blocks, bytes_max=limits.message_bytes_max)
SYNC.register(5, ManifestsRequest, bytes_max=64 * limits.sync_manifests_max)
SYNC.register(6, Manifests, bytes_max=limits.message_bytes_max)

CHUNKS = Messages(CHUNKS_PROTOCOL)
CHUNKS.register(1, ChunksRequest, bytes_max=1024)
CHUNKS.register(2, Chunks, bytes_max=limits.message_bytes_max)


def check_log_request(request: LogRequest) -> None:
    """Raises `RemoteProtocolError` for a question outside the limits."""
    if not 0 <= request.after < 2**63:
        raise RemoteProtocolError(SYNC_PROTOCOL, f"a log has no number {request.after}")
    if not 0 <= request.limit <= limits.sync_page_ids_max:
        raise RemoteProtocolError(SYNC_PROTOCOL, f"{request.limit} ids of a log at once")


def check_ids(ids: Sequence[bytes], most: int) -> None:
    """Raises `RemoteProtocolError` unless there are 1 to `most` different well-formed ids."""
    if not 0 < len(ids) <= most:
        raise RemoteProtocolError(SYNC_PROTOCOL, f"{len(ids)} ids, 1 to {most} are allowed")
    if not all(map(is_cid, ids)) or len(set(ids)) != len(ids):
        raise RemoteProtocolError(SYNC_PROTOCOL, "an id is malformed or asked for twice")


def check_hashes(hashes: Sequence[bytes]) -> None:
    """Raises `RemoteProtocolError` unless these are different chunk hashes, not too many."""
    if not 0 < len(hashes) <= limits.chunks_per_request_max:
        raise RemoteProtocolError(CHUNKS_PROTOCOL, f"{len(hashes)} chunks at once")
    if any(len(h) != DIGEST_BYTES for h in hashes) or len(set(hashes)) != len(hashes):
        raise RemoteProtocolError(CHUNKS_PROTOCOL, "a hash is malformed or asked for twice")


def fill(items: Iterable[tuple[bytes, bytes | None]]) -> tuple[list[bytes], list[bytes]]:
    """What of (id, data) goes into one reply: data as far as it fits, and the missing ids."""
    room = REPLY_BYTES_MAX
    found: list[bytes] = []
    missing: list[bytes] = []
    for id, data in items:
        if data is None:
            missing.append(id)
        elif len(data) + 8 > room:
            break
        else:
            room -= len(data) + 8
            found.append(data)
    return found, missing


def take_blocks(
    reply: Blocks, asked: Sequence[BlockId], *, network: NetworkId, now_ms: int
) -> tuple[dict[BlockId, Block], list[BlockId]]:
    """The verified blocks of a reply and those that the peer does not have.

    Raises `RemoteProtocolError` for a malformed block and for one that was not asked for.
    """
    blocks = decode_blocks(reply.blocks, network=network, now_ms=now_ms)
    found = {block.id: block for block in blocks}
    return found, [BlockId(id) for id in _check_reply(found, reply.missing, asked)]


def take_manifests(
    reply: Manifests, asked: Sequence[ManifestId]
) -> tuple[dict[ManifestId, tuple[Manifest, bytes]], list[ManifestId]]:
    """The checked manifests of a reply with their bytes, and those that the peer does not have."""
    raw = {ManifestId(cid(data)): data for data in reply.manifests}
    missing = _check_reply(raw, reply.missing, asked)
    found = {id: (Manifest.decode(data), data) for id, data in raw.items()}
    return found, [ManifestId(id) for id in missing]


def take_chunks(
    reply: Chunks, asked: Sequence[tuple[ChunkHash, int]]
) -> tuple[list[tuple[ChunkHash, bytes]], list[ChunkHash]]:
    """The verified chunks of a reply and those that the peer does not have.

    Raises `RemoteProtocolError` if any piece is not what its hash says. A piece that is, and has
    another size than the manifest says, cannot be had of anybody: that is the author's fault.
    """
    if len(reply.data) != len(asked):
        raise RemoteProtocolError(CHUNKS_PROTOCOL, f"{len(reply.data)} answers to {len(asked)}")
    found: list[tuple[ChunkHash, bytes]] = []
    absent: list[ChunkHash] = []
    for (name, size), data in zip(asked, reply.data, strict=True):
        if data is None:
            absent.append(name)
        elif chunk_hash(data) != name:
            raise RemoteProtocolError(CHUNKS_PROTOCOL, f"chunk {name.hex()} is corrupt")
        elif len(data) != size:
            absent.append(name)
        else:
            found.append((name, data))
    return found, absent


def _check_reply(
    found: Mapping[bytes, object] | Mapping[BlockId, object] | Mapping[ManifestId, object],
    missing: Sequence[bytes],
    asked: Sequence[bytes],
) -> Sequence[bytes]:
    wanted = set(asked)
    if not wanted.issuperset(found) or not wanted.issuperset(missing):
        raise RemoteProtocolError(SYNC_PROTOCOL, "an answer to something that was not asked")
    if not found and not missing:
        raise RemoteProtocolError(SYNC_PROTOCOL, "an answer without an item")
    return [id for id in missing if id not in found]
