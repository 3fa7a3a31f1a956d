"""One file of the hub, appended to what is here of it already, and checked when it is whole."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from blyan_node.hub.messages import HubFile
from protocols import limits

Tell = Callable[[int], None]
TELL_BYTES = 4 * limits.MIB
TELL_S = 0.2


class NotWhatItSaid(Exception):
    """The hub sends other bytes than its listing promised."""


class CutOff(Exception):
    """The hub stopped in the middle."""


class Stream(Protocol):
    """An answer to a request for bytes."""

    whole: bool  # it begins at the start of the file, wherever it was asked to begin

    def pieces(self) -> Iterator[bytes]:
        """Its bytes; may raise anything."""


Ask = Callable[[int, int], AbstractContextManager[Stream]]
"""Asks for the bytes [begin, end) of the file."""


def transfer(file: HubFile, path: Path, upto: int | None, ask: Ask, tell: Tell) -> None:
    """Completes `path`; raises `NotWhatItSaid`, `CutOff`, `OSError`, and what `ask` raises.

    What a run before left is hashed and kept. If the whole is wrong, that may be to blame: it is
    then fetched once more from its start.
    """
    with path.open("a+b") as output:
        have = output.seek(0, 2)
        if have > file.size:
            have = output.truncate(0)
        if upto is not None:
            _append(file, output, min(upto, file.size), ask, tell)
            return
        ours = have == 0  # all of it comes from this run
        while True:
            _append(file, output, file.size, ask, tell)
            if _fits(file, output, tell):
                return
            output.truncate(0)
            if ours:
                raise NotWhatItSaid(f"{file.name} does not have the hash that it should have")
            ours = True


def _append(file: HubFile, output: BinaryIO, end: int, ask: Ask, tell: Tell) -> None:
    have = output.seek(0, 2)
    if have >= end:
        return
    told, at = have, time.monotonic()
    with ask(have, end) as stream:
        if stream.whole and have:
            have = output.truncate(0)
        for piece in stream.pieces():
            if have + len(piece) > end and end == file.size:
                raise NotWhatItSaid(
                    f"{file.name} is longer than the {file.size} bytes it should be"
                )
            have += output.write(piece[: end - have])
            if have - told >= TELL_BYTES or time.monotonic() - at >= TELL_S:
                output.flush()
                tell(have)
                told, at = have, time.monotonic()
            if have == end:
                break
    output.flush()
    if have < end:
        raise CutOff(f"{file.name} ended after {have} of {file.size} bytes")


def _fits(file: HubFile, output: BinaryIO, tell: Tell) -> bool:
    """Whether the file has its size and its hash."""
    blob = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    hasher = hashlib.sha256() if len(file.hash) == 64 else blob
    size = output.seek(0)
    while piece := output.read(TELL_BYTES):
        hasher.update(piece)
        size += len(piece)
        tell(size)
    return size == file.size and hasher.hexdigest() == file.hash
