"""What the memory of a process is made of, as the system counts it (Linux).

Pages are a process's *own* (anonymous: what it computed or copied) or a file's that it has mapped:
pack files, from which weights are used in place; table files of LevelDB; programs and libraries.
Pages of files can be taken back at any time, own ones cannot.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from storage.packs import SUFFIX

_TABLES = (".ldb", ".sst")
_DELETED = " (deleted)"


@dataclass(frozen=True)
class Footprint:
    """Resident bytes of a process by where they are from."""

    own: int
    packs: int
    tables: int
    programs: int

    @property
    def total(self) -> int:
        """Everything that is resident (RSS)."""
        return self.own + self.packs + self.tables + self.programs


def footprint(pid: int) -> Footprint:
    """The memory of a process now; raises `OSError` if it has ended."""
    found = dict.fromkeys(("own", "packs", "tables", "programs"), 0)
    path, resident = "", 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "Rss":
            resident = _bytes(rest)
        elif name == "Anonymous":
            own = _bytes(rest)
            found["own"] += own
            found[_kind(path)] += resident - own
        elif "-" in name.split(" ", 1)[0]:  # the line that begins a mapping
            fields = line.split(maxsplit=5)
            path = fields[5] if len(fields) > 5 else ""
    return Footprint(**found)


def _kind(path: str) -> str:
    path = path.removesuffix(_DELETED)
    if path.endswith(SUFFIX):
        return "packs"
    if path.endswith(_TABLES):
        return "tables"
    return "programs"


def own_bytes(pid: int) -> int:
    """The pages of a process that belong to no file (RssAnon); 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    rows = dict(line.split(":", 1) for line in status.splitlines())
    return _bytes(rows["RssAnon"]) if "RssAnon" in rows else 0  # a zombie has none


def _bytes(text: str) -> int:
    return int(text.split()[0]) * 1024


@dataclass
class Peaks:
    """Samples the own memory of processes while it is entered: `peak` is the most of each, bytes.

    The system keeps a high-water mark only of everything together. A copy of hundreds of megabytes
    lasts for many samples.
    """

    pids: Mapping[str, int]
    every_s: float = 0.005
    peak: dict[str, int] = field(default_factory=dict)
    seen: int = 0  # samples so far

    def __enter__(self) -> Self:
        self._sample()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peaks", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.every_s):
            self._sample()

    def _sample(self) -> None:
        self.seen += 1
        for name, pid in self.pids.items():
            self.peak[name] = max(self.peak.get(name, 0), own_bytes(pid))
