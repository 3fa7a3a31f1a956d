"""What the daemon and its hub process say to each other: frames of length and msgpack.

The daemon sends `Open`, then `Look`, then any number of `Get`; each is answered before the next is
sent. `Got` is not an answer, but a sign of life on the way to one.
"""

import re
from typing import Any

import msgspec

from protocols import limits

LENGTH_BYTES = 4
_SEPARATORS = frozenset("/\\\0")
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Open(msgspec.Struct, tag=True, frozen=True):
    """Where the hub is and how patient to be with it; `home` is for the library's own files.

    A request is given up after `read_s` without a byte, and tried again after `pause_s`, up to
    `tries` times in a row without any. Not answered.
    """

    endpoint: str
    home: str
    read_s: float
    pause_s: float
    tries: int


class Look(msgspec.Struct, tag=True, frozen=True):
    """Which commit a revision is and what is in it; answered with `Listing`."""

    repository: str
    revision: str


class Get(msgspec.Struct, tag=True, frozen=True):
    """Append to the file `path` what it lacks of a file of the listing; answered with `Whole`.

    With `upto` only so many of its first bytes, unverified; else all, and the file is checked.
    """

    name: str
    path: str
    upto: int | None = None


class HubFile(msgspec.Struct, frozen=True):
    """One file of a commit; `hash` is the SHA-256 of its bytes, or git's SHA-1 of it as a blob.

    Name and hash become names in a folder of ours: raises `ValueError` for what is more than that.
    """

    name: str
    size: int
    hash: str

    def __post_init__(self) -> None:
        shown = repr(self.name)[:80]
        if self.name in ("", ".", "..") or not _SEPARATORS.isdisjoint(self.name):
            raise ValueError(f"{shown} is no name of a file in its folder")
        if not 0 <= self.size <= limits.hub_file_bytes_max or not _HASH.fullmatch(self.hash):
            raise ValueError(f"{shown} has no size or hash")


class Listing(msgspec.Struct, tag=True, frozen=True):
    """The files in the root folder of a commit; `private` if not everybody may read them.

    Raises `ValueError` for a commit that is not git's.
    """

    commit: str
    private: bool
    files: list[HubFile]

    def __post_init__(self) -> None:
        if not _COMMIT.fullmatch(self.commit):
            raise ValueError(f"{self.commit[:80]!r} is no commit")


class Got(msgspec.Struct, tag=True, frozen=True):
    """So many bytes of the file are here and hashed."""

    done: int


class Whole(msgspec.Struct, tag=True, frozen=True):
    """The file is as long as it was asked for; all of it is what the listing promised."""


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """A `Refused` on its way."""

    code: int
    what: str
    why: str
    next: str
    data: dict[str, Any]


Request = Open | Look | Get
Answer = Listing | Got | Whole | Refusal


def frame(message: Request | Answer) -> bytes:
    """A message as it travels."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data
