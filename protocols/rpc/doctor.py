"""`node.doctor`: why a node cannot be reached or cannot keep up, and what to do."""

from typing import Literal

from protocols.rpc.fields import Request, Result

Verdict = Literal["ok", "warn", "bad"]


class DoctorRequest(Request, frozen=True):
    """No parameters."""


class Finding(Result, frozen=True):
    """One check: `what` was found, and where it is not `ok`, `why` and what to do `next`."""

    name: str
    verdict: Verdict
    what: str
    why: str = ""
    next: str = ""


class DoctorResult(Result, frozen=True):
    """What the node finds out about itself by asking its peers, its disk and its event loop."""

    findings: list[Finding]
