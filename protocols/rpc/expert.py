"""`expert.*`: who holds what."""

from typing import Annotated

from msgspec import Meta

from protocols.rpc.fields import Count, ModelName, Request, Result, SubjectText

Subjects = Annotated[list[SubjectText], Meta(min_length=1, max_length=4096)]


class ExpertListRequest(Request, frozen=True):
    """All experts, or those of one model."""

    model: ModelName | None = None


class Holder(Result, frozen=True):
    """A node that holds an expert; `queue` is the requests that wait there.

    `rtt_ms` is 0 for the node that was asked and null for a peer that was not measured yet.
    `profile` is the numeric profile, precision included, that it computes with.
    """

    peer_id: str
    rtt_ms: float | None
    queue: Count
    profile: str | None


class ExpertInfo(Result, frozen=True):
    """One expert at its head, and its live holders."""

    subject: str
    block: str
    holders: list[Holder]


class ExpertsResult(Result, frozen=True):
    """Experts in the order of their model and subject."""

    experts: list[ExpertInfo]


class WhereRequest(Request, frozen=True):
    """Which expert; the model may be left out while there is only one."""

    subject: SubjectText
    model: ModelName | None = None


class HoldRequest(Request, frozen=True):
    """Experts that this node is to hold; they are fetched if they are not stored."""

    subjects: Subjects
    model: ModelName | None = None


class DropRequest(Request, frozen=True):
    """Experts that this node is to hold no longer; the last known copy only with `force`."""

    subjects: Subjects
    model: ModelName | None = None
    force: bool = False


class HeldResult(Result, frozen=True):
    """The subjects that were changed, and what the node holds now."""

    subjects: list[str]
    experts: Count
    bytes: Count


class ExpertStatsRequest(Request, frozen=True):
    """No parameters."""


class ExpertStats(Result, frozen=True):
    """What one held expert has done since the node started; `busy_s` is time in its products.

    `storage` is how its matrices lie in memory: bfloat16, int8, mxfp4 and so on.
    """

    subject: str
    block: str
    storage: str
    bytes: Count
    calls: Count
    rows: Count
    busy_s: float


class MemoryStats(Result, frozen=True):
    """Bytes: of `budget` (`--memory`) experts, trunks and the caches of running requests take some.

    `copied` were copied by loading, since the node started; what is used in place is not. `packs`
    is what the mapped files take on the disk. `anonymous` and `file` are the process's memory as
    the system counts it: its own, and of mapped files; None where it does not say.
    """

    budget: Count
    experts: Count
    trunks: Count
    caches: Count
    free: Count
    copied: Count
    packs: Count
    anonymous: Count | None
    file: Count | None


class ExpertStatsResult(Result, frozen=True):
    """The node's work for others: what waits, what was turned away, and each expert's share."""

    queue: Count
    requests: Count
    busy: Count
    experts: list[ExpertStats]
    memory: MemoryStats
