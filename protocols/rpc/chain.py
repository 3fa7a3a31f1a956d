"""`chain.*` and `block.*`: the DAG, who wrote it, and whether it all checks."""

from typing import Annotated

from msgspec import Meta

from protocols.rpc.fields import BlockText, Count, ModelName, Request, Result


class ChainStatusRequest(Request, frozen=True):
    """No parameters."""


class ChainStatusResult(Result, frozen=True):
    """Accepted blocks, those that wait for a release, those that wait for a parent, and models."""

    network: str
    blocks: Count
    staged: Count
    parked: Count
    models: Count


class HeadsRequest(Request, frozen=True):
    """All models, or one."""

    model: ModelName | None = None


class Fork(Result, frozen=True):
    """Successors of one base; `chosen` is the one that every node takes.

    `subject` and `base` are None where first releases of a model compete.
    """

    subject: str | None
    base: str | None
    chosen: str
    others: list[str]


class ModelHeads(Result, frozen=True):
    """The heads of one model by subject, and the forks that were kept."""

    model: str
    name: str
    root: str
    heads: dict[str, str]
    forks: list[Fork]


class HeadsResult(Result, frozen=True):
    """Heads of each model."""

    models: list[ModelHeads]


class LogRequest(Request, frozen=True):
    """A page of the order in which this node accepted blocks."""

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class BlockInfo(Result, frozen=True):
    """A header in text forms; `time` is in ms since 1970."""

    id: str
    chain: str
    kind: str
    author: str
    seq: Count
    time: int
    depends_on: list[str]
    model: str | None
    subject: str | None
    base: str | None
    size: Count
    meta: dict[str, str | int]


class LogEntry(Result, frozen=True):
    """`n` counts this node's accepted blocks from 1."""

    n: Count
    block: BlockInfo


class LogResult(Result, frozen=True):
    """`next` is the `after` of the following page, None at the end."""

    entries: list[LogEntry]
    next: Count | None


class ChainVerifyRequest(Request, frozen=True):
    """No parameters."""


class BadHeader(Result, frozen=True):
    """A block whose header does not check, and why."""

    block: str
    why: str


class ChainVerifyResult(Result, frozen=True):
    """`ok` if every header is canonical, signed, and fits its parents."""

    ok: bool
    blocks: Count
    bad: list[BadHeader]


class GraphRequest(Request, frozen=True):
    """All models, or one."""

    model: ModelName | None = None


class GraphResult(Result, frozen=True):
    """A Graphviz document."""

    dot: str


class BlockRequest(Request, frozen=True):
    """Which block."""

    id: BlockText


class TensorInfo(Result, frozen=True):
    """One tensor of a body."""

    name: str
    dtype: str
    shape: list[int]
    bytes: Count


class BlockResult(BlockInfo, frozen=True):
    """A block: `accepted` by the chain, `stored` if every chunk is here; tensors if known."""

    network: str
    body: str | None
    accepted: bool
    stored: bool
    tensors: list[TensorInfo] | None
