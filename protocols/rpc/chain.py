"""`chain.*` and `block.*`: the DAG, who wrote it, and whether it all checks."""

from typing import Annotated

from msgspec import Meta

from protocols.rpc.fields import BlockText, Count, ModelName, Request, Result


class ChainStatusRequest(Request):
    """No parameters."""


class ChainStatusResult(Result):
    """Accepted blocks, those that wait for a release, those that wait for a parent, and models."""

    network: str
    blocks: Count
    staged: Count
    parked: Count
    models: Count


class HeadsRequest(Request):
    """All models, or one."""

    model: ModelName | None = None


class Fork(Result):
    """Successors of one base: `chosen` is the one that every node takes."""

    subject: str
    base: str
    chosen: str
    others: list[str]


class ModelHeads(Result):
    """The heads of one model by subject, and the forks that were kept."""

    model: str
    name: str
    root: str
    heads: dict[str, str]
    forks: list[Fork]


class HeadsResult(Result):
    """Heads of each model."""

    models: list[ModelHeads]


class LogRequest(Request):
    """A page of the order in which this node accepted blocks."""

    after: Count = 0
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class BlockInfo(Result):
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


class LogEntry(Result):
    """`n` counts this node's accepted blocks from 1."""

    n: Count
    block: BlockInfo


class LogResult(Result):
    """`next` is the `after` of the following page, None at the end."""

    entries: list[LogEntry]
    next: Count | None


class ChainVerifyRequest(Request):
    """No parameters."""


class BadHeader(Result):
    """A block whose header does not check, and why."""

    block: str
    why: str


class ChainVerifyResult(Result):
    """`ok` if every header is canonical, signed, and fits its parents."""

    ok: bool
    blocks: Count
    bad: list[BadHeader]


class GraphRequest(Request):
    """All models, or one."""

    model: ModelName | None = None


class GraphResult(Result):
    """A Graphviz document."""

    dot: str


class BlockRequest(Request):
    """Which block."""

    id: BlockText


class TensorInfo(Result):
    """One tensor of a body."""

    name: str
    dtype: str
    shape: list[int]
    bytes: Count


class BlockResult(BlockInfo):
    """A block: `accepted` by the chain, `stored` if every chunk is here; tensors if known."""

    network: str
    body: str | None
    accepted: bool
    stored: bool
    tensors: list[TensorInfo] | None
