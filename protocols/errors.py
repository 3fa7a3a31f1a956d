"""Every way in which a protocol can be broken, and how a refusal is told to a person.

Two kinds of protocol error, and one decides whose fault it was:

* `LocalProtocolError`: our own code made an illegal move. It is a bug and surfaces loudly.
* `RemoteProtocolError`: a peer, a file or a client sent something malformed. It costs the sender
  score and never the node.

`Refused` is the third: a request was understood and is not going to be done. It carries what an
operator needs (what happened, why, what to do next) and a number for programs.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ErrorCode", "LocalProtocolError", "NotYet", "Refused", "RemoteProtocolError"]


class LocalProtocolError(Exception):
    """Our own code tried a move that the protocol forbids."""


class RemoteProtocolError(Exception):
    """Input from outside broke a rule.

    `where` names the surface and, as far as known, the place in it ("header", "frame kind 9",
    "config.json: rope_parameters"); `why` is one clause that a person can act on.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why


class NotYet(RemoteProtocolError):
    """Input that may be good a little later, by a clock that is not ours: it costs no score."""


class ErrorCode(enum.IntEnum):
    """Numbers of refusals on the RPC. The -327xx block belongs to JSON-RPC itself."""

    PARSE = -32700
    INVALID_REQUEST = -32600
    METHOD_NOT_FOUND = -32601
    INVALID_PARAMS = -32602
    INTERNAL = -32603
    NOT_FOUND = 1
    AMBIGUOUS = 2
    STALE_BASE = 3
    BAD_MODEL = 4
    CONFLICT = 5
    BLOCK_MISSING = 6
    EXPERT_UNAVAILABLE = 7
    DISK_FULL = 8
    BUSY = 9
    CANCELLED = 10
    LAST_COPY = 11
    CORRUPT = 12
    NOT_ALLOWED = 13
    TIMEOUT = 14
    BAD_INPUT = 15
    NO_NODE = 16
    HUB_FAILED = 17


@dataclass
class Refused(Exception):
    """A request that was understood and is refused.

    `what` happened, `why`, and what to do `next`; `data` names what it is about (`head`, `expert`,
    `block`, `path`, ...) for programs.
    """

    code: ErrorCode
    what: str
    why: str
    next: str = ""
    data: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.what, self.why) if part) + (
            f". {self.next}" if self.next else ""
        )
