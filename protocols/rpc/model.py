"""`model.*`: models in and out of the network."""

from protocols.rpc.fields import (
    BlockText,
    Count,
    ModelName,
    NewName,
    PathText,
    Replicas,
    Request,
    Result,
    RootText,
    SubjectText,
)


class PublishRequest(Request, frozen=True):
    """`path` is a Hugging Face directory; with `wait_replicas` the answer waits for holders."""

    path: PathText
    name: NewName
    wait_replicas: Replicas | None = None


class PublishResult(Result, frozen=True):
    """Counts of new blocks, of the model's experts, its bytes, and those stored already."""

    model: str
    name: str
    root: str
    blocks: Count
    experts: Count
    bytes: Count
    reused_bytes: Count


class ListRequest(Request, frozen=True):
    """No parameters."""


class ModelInfo(Result, frozen=True):
    """One model; `held` counts its experts that have a live holder."""

    name: str
    model: str
    author: str
    family: str
    root: str
    experts: Count
    held: Count
    bytes: Count


class ListResult(Result, frozen=True):
    """Every model that the node knows whole."""

    models: list[ModelInfo]


class ShowRequest(Request, frozen=True):
    """Which model."""

    model: ModelName


class SubjectInfo(Result, frozen=True):
    """The head of one subject, the names of its tensors, and its size."""

    block: str
    tensors: list[str]
    bytes: Count


class ShowResult(ModelInfo, frozen=True):
    """A model with the head of each subject."""

    subjects: dict[str, SubjectInfo]


class FetchRequest(Request, frozen=True):
    """Which model, and at which root."""

    model: ModelName
    root: RootText | None = None


class FetchResult(Result, frozen=True):
    """What the fetch brought, and each peer's share of the bytes; what was here does not count."""

    blocks: Count
    bytes: Count
    peers: dict[str, int]


class VerifyRequest(Request, frozen=True):
    """Which model."""

    model: ModelName


class BadBlock(Result, frozen=True):
    """A block of a model that does not check, and why."""

    subject: str
    block: str
    why: str


class VerifyResult(Result, frozen=True):
    """`ok` if every byte of every block is stored here and right."""

    ok: bool
    blocks: Count
    bytes: Count
    bad: list[BadBlock]


class WaitRequest(Request, frozen=True):
    """Answers once every expert of the model has this many live holders."""

    model: ModelName
    replicas: Replicas


class WaitResult(Result, frozen=True):
    """The smallest number of live holders over the model's experts."""

    replicas: Count


class ExportRequest(Request, frozen=True):
    """`out` must not exist, or be an empty directory."""

    model: ModelName
    out: PathText
    root: RootText | None = None


class ExportResult(Result, frozen=True):
    """Where the Hugging Face directory is, and what it holds."""

    path: str
    files: Count
    bytes: Count


class UpdateRequest(Request, frozen=True):
    """`weights` is a safetensors file; `base` the head it replaces (None: the current one)."""

    model: ModelName
    subject: SubjectText
    weights: PathText
    base: BlockText | None = None


class UpdateResult(Result, frozen=True):
    """The new head of the subject, what it replaced, and the model's new root."""

    subject: str
    block: str
    base: str
    root: str
