"""Every key of the store, in one file.

A key is a tag of one byte and fixed-width big-endian fields, so that rows of a family lie together
and in the order of their fields. Each family is a named tuple with its layout; `Family` turns one
into the other and back, and an assertion under each family shows that the way back is the same.

Two databases: the *index* holds everything small, the *chunks* hold nothing but tensor bytes under
keys that grow, because sorted arrivals cost LevelDB no second writing.
"""

import struct
from typing import Generic, NamedTuple, TypeVar

from protocols.errors import LocalProtocolError
from protocols.ids import Subject, SubjectKind, SubjectName, parse_subject

_SUBJECT_KINDS: tuple[SubjectKind, ...] = (
    "embed", "attention", "router", "expert", "shared", "mlp", "final", "head", "mtp",
)  # fmt: skip
_SUBJECT = struct.Struct(">BII")
SUBJECT_BYTES = _SUBJECT.size

F = TypeVar("F", bound=tuple[object, ...])


class Family(Generic[F]):
    """The keys of one kind of row: `tag`, then the fields of `fields` as `layout` packs them."""

    def __init__(self, tag: bytes, layout: str, fields: type[F]) -> None:
        assert len(tag) == 1
        self.tag = tag
        self._fields = fields
        self._layout = struct.Struct(">" + layout)

    def key(self, *fields: object) -> bytes:
        """The key of a row; a field that does not fit its width is our bug."""
        try:
            packed = self._layout.pack(*fields)
        except struct.error as error:
            raise LocalProtocolError(f"key {self.tag!r}: {error}") from None
        if self._layout.unpack(packed) != fields:
            raise LocalProtocolError(f"key {self.tag!r}: a field has another width: {fields!r}")
        return self.tag + packed

    def prefix(self, *fields: bytes) -> bytes:
        """What the keys of all rows that begin with these byte fields have in common."""
        return self.tag + b"".join(fields)

    def parse(self, key: bytes) -> F:
        """The fields of a key of this family."""
        if key[:1] != self.tag or len(key) != 1 + self._layout.size:
            raise LocalProtocolError(f"{key[:80]!r} is not a key of family {self.tag!r}")
        return self._fields(*self._layout.unpack_from(key, 1))

    def round_trips(self, *fields: object) -> bool:
        """Whether a key made of `fields` parses to `fields`."""
        return self.parse(self.key(*fields)) == fields


def pack_subject(subject: Subject) -> bytes:
    """9 bytes: kind, layer + 1, expert + 1 (0: none)."""
    name = parse_subject(subject)
    layer, expert = (0 if n is None else n + 1 for n in (name.layer, name.expert))
    return _SUBJECT.pack(_SUBJECT_KINDS.index(name.kind), layer, expert)


def unpack_subject(packed: bytes) -> Subject:
    """The inverse of `pack_subject`."""
    kind, layer, expert = _SUBJECT.unpack(packed)
    numbers = (None if n == 0 else n - 1 for n in (layer, expert))
    return Subject(str(SubjectName(_SUBJECT_KINDS[kind], *numbers)))


_ID, _ID2 = bytes(range(36)), bytes(range(36, 72))
_HASH, _KEY, _LOG = bytes(range(32)), bytes(range(1, 33)), bytes(range(16))


class ById(NamedTuple):
    """A row about one block, manifest or release."""

    id: bytes


class BySeq(NamedTuple):
    """A row about one place in the acceptance log (from 1)."""

    seq: int


class Pair(NamedTuple):
    """A row that says that `id` belongs to `of` (its base, its model)."""

    of: bytes
    id: bytes


class ByHash(NamedTuple):
    """A row about one chunk or root."""

    hash: bytes


class Head(NamedTuple):
    """The current block of a subject."""

    model: bytes
    subject: bytes


class PastHead(NamedTuple):
    """The block of a subject from `version` (a log seq) on."""

    model: bytes
    subject: bytes
    version: int


class Pinned(NamedTuple):
    """A block that is kept for a reason (`storage.pins.Pin`)."""

    id: bytes
    reason: int


class Cursor(NamedTuple):
    """How far we read the log `log` of a peer."""

    peer: bytes
    log: bytes


class Stored(NamedTuple):
    """The bytes of a chunk, in order of arrival."""

    seq: int
    hash: bytes


SCHEMA_KEY = b"!"  # value: SCHEMA_VALUE
COUNTERS_KEY = b"#"  # value: COUNTERS_VALUE

BLOCK = Family(b"B", "36s", ById)  # value: BLOCK_VALUE, then the block's wire form
assert BLOCK.round_trips(_ID)
MANIFEST = Family(b"M", "36s", ById)  # value: the manifest's canonical bytes
assert MANIFEST.round_trips(_ID)
LOG = Family(b"L", "Q", BySeq)  # value: block id
assert LOG.round_trips(2**64 - 1)
MODEL = Family(b"D", "36s", ById)  # value: empty
assert MODEL.round_trips(_ID)
SUCCESSOR = Family(b"S", "36s36s", Pair)  # of: base; value: empty
assert SUCCESSOR.round_trips(_ID, _ID2)
RELEASE = Family(b"R", "36s36s", Pair)  # of: model; value: empty
assert RELEASE.round_trips(_ID, _ID2)
STAGED = Family(b"T", "36s36s", Pair)  # of: model; value: empty
assert STAGED.round_trips(_ID, _ID2)
SUBJECTS = Family(b"U", "36s", ById)  # id: release; value: the release's body
assert SUBJECTS.round_trips(_ID)
HEAD = Family(b"H", f"36s{SUBJECT_BYTES}s", Head)  # value: block id
assert HEAD.round_trips(_ID, b"s" * SUBJECT_BYTES)
PAST_HEAD = Family(b"h", f"36s{SUBJECT_BYTES}sQ", PastHead)  # value: block id
assert PAST_HEAD.round_trips(_ID, b"s" * SUBJECT_BYTES, 7)
ROOT = Family(b"O", "32s", ByHash)  # value: ROOT_VALUE
assert ROOT.round_trips(_HASH)
PIN = Family(b"P", "36sB", Pinned)  # value: empty
assert PIN.round_trips(_ID, 255)
CURSOR = Family(b"Q", "32s16s", Cursor)  # value: NUMBER, the last seq that was read
assert CURSOR.round_trips(_KEY, _LOG)
AUTHOR = Family(b"A", "32s", ByHash)  # hash: public key; value: NUMBER, the largest seq seen
assert AUTHOR.round_trips(_KEY)
CHUNK = Family(b"C", "32s", ByHash)  # value: CHUNK_VALUE
assert CHUNK.round_trips(_HASH)
LEAVING = Family(b"X", "Q32s", Stored)  # a chunk that is being removed; value: empty
assert LEAVING.round_trips(2**63, _HASH)
DATA = Family(b"c", "Q32s", Stored)  # in the chunk database; value: the chunk
assert DATA.round_trips(2**63, _HASH)

INDEX_FAMILIES = (
    BLOCK, MANIFEST, LOG, MODEL, SUCCESSOR, RELEASE, STAGED, SUBJECTS, HEAD, PAST_HEAD, ROOT, PIN,
    CURSOR, AUTHOR, CHUNK, LEAVING,
)  # fmt: skip
assert len({family.tag for family in INDEX_FAMILIES} | {b"!", b"#"}) == len(INDEX_FAMILIES) + 2

SCHEMA_VALUE = struct.Struct(">I16s")  # version, log id
COUNTERS_VALUE = struct.Struct(">QQQQQ")  # see storage.index.Counters
BLOCK_VALUE = struct.Struct(">IQ")  # crc32 of all that follows, log seq (0: staged)
ROOT_VALUE = struct.Struct(">36sQ36s")  # model, version, release (zeros: of the heads)
CHUNK_VALUE = struct.Struct(">QI")  # seq, bytes
NUMBER = struct.Struct(">Q")
