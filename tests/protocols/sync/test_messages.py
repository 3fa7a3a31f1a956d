"""Questions and answers of sync: what is asked, what is believed, and nothing else."""

import random

import pytest

from blyan_node.testing.blocks import NOW_MS, Author
from protocols import limits
from protocols.dag.genesis import DEVELOPMENT
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, ChunkHash, ManifestId, chunk_hash, cid
from protocols.sync.logs import LogWalk
from protocols.sync.messages import (
    CHUNKS,
    REPLY_BYTES_MAX,
    SYNC,
    Blocks,
    BlocksRequest,
    Chunks,
    ChunksRequest,
    LogPage,
    LogRequest,
    Manifests,
    ManifestsRequest,
    check_hashes,
    check_ids,
    check_log_request,
    fill,
    take_blocks,
    take_chunks,
    take_manifests,
)

ALICE = Author("alice")
PUBLISHED = ALICE.publish()
IDS = [m.id for m in PUBLISHED]
LOG = bytes(16)
NET = DEVELOPMENT.id
LATER = NOW_MS + 1_000


@pytest.mark.parametrize(
    "message",
    [
        LogRequest(0, 1000),
        LogPage(LOG, [bytes(i) for i in IDS], 4, 4),
        BlocksRequest([bytes(IDS[0])]),
        Blocks([b"x"], [b"y"]),
        ManifestsRequest([b"x"]),
        Manifests([b"x"], []),
    ],
)
def test_sync_messages_come_back(message: object) -> None:
    assert SYNC.decode(SYNC.encode(message)) == message


def test_the_largest_replies_fit() -> None:
    page = LogPage(LOG, [cid(b"%d" % i) for i in range(limits.sync_page_ids_max)], 2**62, 2**62)
    assert SYNC.decode(SYNC.encode(page)) == page
    asked = BlocksRequest([cid(b"%d" % i) for i in range(limits.sync_headers_max)])
    assert SYNC.decode(SYNC.encode(asked)) == asked
    chunks = Chunks([bytes(limits.chunk_bytes)] * limits.chunks_per_request_max)
    assert CHUNKS.decode(CHUNKS.encode(chunks)) == chunks
    hashes = ChunksRequest([bytes(32)] * limits.chunks_per_request_max)
    assert CHUNKS.decode(CHUNKS.encode(hashes)) == hashes
    found, _ = fill((b"id", bytes(limits.manifest_bytes_max)) for _ in range(5))
    assert len(found) == 1
    assert SYNC.encode(Manifests(found, []))


def test_fill_stops_where_the_reply_is_full_and_names_the_missing() -> None:
    big = bytes(REPLY_BYTES_MAX // 2 - 8)
    found, missing = fill([(b"a", big), (b"b", None), (b"c", big), (b"d", big), (b"e", None)])
    assert (found, missing) == ([big, big], [b"b"])


def test_questions_outside_the_limits() -> None:
    check_log_request(LogRequest(0, 0))
    for bad in (LogRequest(-1, 5), LogRequest(0, 1001), LogRequest(0, -1), LogRequest(2**63, 1)):
        with pytest.raises(RemoteProtocolError):
            check_log_request(bad)
    check_ids([IDS[0]], 1)
    for ids in ([], [IDS[0], IDS[0]], [b"x"], list(IDS)):
        with pytest.raises(RemoteProtocolError):
            check_ids(ids, 3)
    check_hashes([bytes(32)])
    for hashes in ([], [bytes(32)] * 2, [b"x"], [bytes([i]) * 32 for i in range(9)]):
        with pytest.raises(RemoteProtocolError):
            check_hashes(hashes)


def test_blocks_that_were_asked_for_are_taken() -> None:
    raw = [m.block.encode() for m in PUBLISHED[:2]]
    found, missing = take_blocks(Blocks(raw, [IDS[2]]), IDS, network=NET, now_ms=LATER)
    assert (list(found), missing) == (IDS[:2], [IDS[2]])


def test_answers_that_are_not_to_the_question() -> None:
    raw = PUBLISHED[0].block.encode()
    for reply, match in (
        (Blocks([PUBLISHED[1].block.encode()], []), "not asked"),
        (Blocks([], [IDS[3]]), "not asked"),
        (Blocks([], []), "without an item"),
        (Blocks([raw[:-1] + b"\0"], []), "signature"),
        (Blocks([b""], []), "decode"),
    ):
        with pytest.raises(RemoteProtocolError, match=match):
            take_blocks(reply, [IDS[0]], network=NET, now_ms=LATER)


def test_manifests_are_checked_by_their_ids() -> None:
    made, other = PUBLISHED[0], PUBLISHED[1]
    found, _ = take_manifests(Manifests([made.manifest_bytes], []), [made.manifest_id])
    assert found == {made.manifest_id: (made.manifest, made.manifest_bytes)}
    with pytest.raises(RemoteProtocolError, match="not asked"):
        take_manifests(Manifests([other.manifest_bytes], []), [made.manifest_id])
    with pytest.raises(RemoteProtocolError, match="manifest"):
        take_manifests(Manifests([b"junk"], []), [ManifestId(cid(b"junk"))])


def test_chunks_are_checked_piece_by_piece() -> None:
    asked = [(chunk_hash(b"one"), 3), (chunk_hash(b"three"), 5)]
    found, absent = take_chunks(Chunks([b"one", None]), asked)
    assert (found, absent) == ([(asked[0][0], b"one")], [asked[1][0]])
    for data in ([b"one"], [b"onE", None], [b"one", b"threes"], []):
        with pytest.raises(RemoteProtocolError):
            take_chunks(Chunks(list(data)), asked)
    # A manifest that gives a chunk another size is its author's doing, not the answerer's.
    lied = (ChunkHash(chunk_hash(b"one")), 4)
    assert take_chunks(Chunks([b"one"]), [lied]) == ([], [lied[0]])


def ids(count: int, start: int = 0) -> list[bytes]:
    return [cid(b"%d" % i) for i in range(start, start + count)]


def test_a_walk_goes_page_by_page_from_the_kept_cursor() -> None:
    walk = LogWalk({LOG: 3}.get, page_ids=4)  # type: ignore[arg-type]
    assert walk.request() == LogRequest(0, 0) and not walk.ended
    assert walk.page(LogPage(LOG, [], 0, 10)) is None
    assert walk.request() == LogRequest(3, 4) and walk.left == 7
    page = walk.page(LogPage(LOG, ids(4, 3), 7, 10))
    assert page is not None and page.next == 7 and not walk.ended
    assert walk.done() == page
    assert walk.request() == LogRequest(7, 4)
    assert walk.page(LogPage(LOG, ids(3, 7), 10, 10)) is not None
    walk.done()
    assert walk.ended and walk.left == 0


def test_a_log_that_became_shorter_or_another_is_walked_from_its_beginning() -> None:
    walk = LogWalk(lambda log: 9 if log == LOG else 2)
    walk.page(LogPage(LOG, [], 0, 5))
    assert walk.cursor == 0
    walk.page(LogPage(LOG, ids(5), 5, 5))
    walk.done()
    walk.page(LogPage(LOG, [], 0, 2))
    assert walk.cursor == 0
    other = b"1" * 16
    walk.page(LogPage(other, ids(2), 2, 5))
    assert walk.cursor == 2 and walk.request() == LogRequest(2, limits.sync_page_ids_max)


@pytest.mark.parametrize(
    "reply",
    [
        LogPage(b"short", [], 0, 5),
        LogPage(LOG, ids(5), 5, 9),
        LogPage(LOG, [b"x"], 1, 9),
        LogPage(LOG, [cid(b"1")] * 2, 2, 9),
        LogPage(LOG, ids(2), 3, 9),
        LogPage(LOG, ids(2), 2, 1),
        LogPage(LOG, [], 0, 9),
        LogPage(LOG, [], 0, -1),
    ],
)
def test_pages_that_cannot_be(reply: LogPage) -> None:
    walk = LogWalk(lambda _: 0, page_ids=4)
    walk.page(LogPage(LOG, [], 0, 9))
    with pytest.raises(RemoteProtocolError):
        walk.page(reply)


def test_fuzz_messages() -> None:
    """10,000 mutated messages of both protocols: a message or one type of error."""
    rng = random.Random(5)
    seeds = [
        (SYNC, SYNC.encode(LogPage(LOG, [bytes(i) for i in IDS], 4, 4))),
        (SYNC, SYNC.encode(LogRequest(5, 5))),
        (SYNC, SYNC.encode(Blocks([PUBLISHED[0].block.encode()], [bytes(IDS[1])]))),
        (CHUNKS, CHUNKS.encode(Chunks([b"one", None]))),
        (CHUNKS, CHUNKS.encode(ChunksRequest([bytes(32)]))),
    ]
    asked = [BlockId(i) for i in IDS]
    for case in range(10_000):
        codec, seed = rng.choice(seeds)
        data = bytearray(seed)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data) + 1)
            if rng.random() < 0.5:
                data[at : at + 1] = rng.randbytes(1)
            else:
                del data[at : at + rng.randint(1, 4)]
        try:
            message = codec.decode(bytes(data) if case % 4 else rng.randbytes(rng.randint(0, 80)))
            match message:
                case Blocks():
                    take_blocks(message, asked, network=NET, now_ms=LATER)
                case Chunks():
                    take_chunks(message, [(chunk_hash(b"one"), 3), (chunk_hash(b"two"), 3)])
                case LogPage():
                    LogWalk(lambda _: 0).page(message)
        except RemoteProtocolError:
            pass
