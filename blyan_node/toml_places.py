"""Where things stand in a TOML text: line and column of each key and value at the top level.

tomllib gives values without their places. This reads as much of the grammar as it takes to find
them again, of a text that tomllib accepts and, as far as that goes, of one that it does not: it
never raises, and what it cannot read ends it. Lines and columns count from 1; a column is one
character, whatever its width.
"""

import re
import tomllib
from bisect import bisect_right
from typing import NamedTuple

_BLANK = re.compile(r"(?:[ \t\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_STRING = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL
)
_SCALAR = re.compile(r"[^,\[\]{}#\n\"']+")


class Place(NamedTuple):
    """A character of the text."""

    line: int
    column: int


class Entry(NamedTuple):
    """`key = value` at the top level, or a table's header, whose value is its own place.

    `key` is the first part of a dotted key; `items` are the places of an array's items; `text` is
    the value as it is written.
    """

    key: str
    at: Place
    value: Place
    items: tuple[Place, ...]
    text: str


def entries_of(text: str) -> list[Entry]:
    """The entries of a text in their order; those inside tables are left out."""
    return _Reader(text.replace("\r\n", "\n")).read()


def place_of(text: str, offset: int) -> Place:
    """The place of the character at `offset`."""
    return Place(text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset))


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines = [0] + [m.end() for m in re.finditer("\n", text)]

    def read(self) -> list[Entry]:
        found: list[Entry] = []
        in_table = False
        while self._skip(_BLANK) < len(self._text):
            start = self._at
            header = self._text[start] == "["
            if header:
                self._at = start + (2 if self._text.startswith("[[", start) else 1)
            key = self._key()
            if key is None:
                break
            if header:
                in_table = True
                place = self._place(start)
                found.append(Entry(key, place, place, (), ""))
                self._at = self._end_of_line()
                continue
            value, items = self._value()
            if not in_table:
                text = self._text[value : self._at].strip()
                found.append(Entry(key, self._place(start), self._place(value), items, text))
            if value == self._at:
                break
        return found

    def _place(self, offset: int) -> Place:
        line = bisect_right(self._lines, offset)
        return Place(line, offset - self._lines[line - 1] + 1)

    def _skip(self, pattern: re.Pattern[str]) -> int:
        match = pattern.match(self._text, self._at)
        self._at = match.end() if match else self._at
        return self._at

    def _end_of_line(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _key(self) -> str | None:
        """The first part of a key; leaves the reader behind the `=`, or behind a header's key."""
        self._skip(_SPACE)
        match = _BARE.match(self._text, self._at) or _STRING.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        while self._text.startswith(".", self._skip(_SPACE)):
            self._at += 1
            self._skip(_SPACE)
            if self._skip(_BARE) == self._at:
                self._skip(_STRING)
        if self._text.startswith("=", self._at):
            self._at += 1
            self._skip(_SPACE)
        return _unquoted(match[0])

    def _value(self) -> tuple[int, tuple[Place, ...]]:
        """Where a value begins and where its items do; leaves the reader behind it."""
        start, depth, wanted = self._at, 0, False
        items = []
        while self._at < len(self._text):
            if depth:
                self._skip(_BLANK)
            sign = self._text[self._at : self._at + 1]
            if wanted and depth == 1 and sign not in ("]", "}", ",", ""):
                items.append(self._place(self._at))
                wanted = False
            if sign in ("[", "{"):
                depth += 1
                wanted = depth == 1 and sign == "["
                self._at += 1
            elif sign in ("]", "}", ",") and depth:
                depth -= sign != ","
                wanted = sign == "," and depth == 1
                self._at += 1
            elif self._skip_one() == 0:
                break
            if not depth:
                break
        return start, tuple(items)

    def _skip_one(self) -> int:
        """Skips a string or another scalar; how many characters it had."""
        before = self._at
        return self._skip(_STRING) - before or self._skip(_SCALAR) - before


def _unquoted(key: str) -> str:
    if key[0] not in "\"'":
        return key
    try:
        return str(tomllib.loads(f"key = {key}")["key"])
    except tomllib.TOMLDecodeError:
        return key
