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
    SourceText,
    SubjectText,
)


class PublishRequest(Request, frozen=True):
    """With `wait_replicas` the answer waits for holders."""

    path: SourceText
    name: NewName
    wait_replicas: Replicas | None = None


class PublishResult(Result, frozen=True):
    """Counts of new blocks, of the model's experts, its bytes, and those stored already.

    `source` is where it was downloaded from, with the commit: None for a directory.
    """

    model: str
    name: str
    root: str
    blocks: Count
    experts: Count
    bytes: Count
    reused_bytes: Count
    source: str | None = None


class DryRunRequest(Request, frozen=True):
    """What would be given to `model.publish`."""

    path: SourceText
    name: NewName


class DryRunResult(Result, frozen=True):
    """The numbers of the publish that would follow; what cannot be published is refused.

    `model` is None if it would be a new one. `new_bytes` would be added to the store, release
    included, and `room_bytes` may be. `seconds` is estimated from the two rates: of reading and
    hashing this directory, and of writing to this disk (None: nothing to write). Of a model whose
    weights are on the hub, `download_bytes` are to be fetched, and what only they tell is None.
    `kept_bytes` are of layers that are kept and exported and never computed.
    """

    model: str | None
    name: str
    experts: Count
    blocks: Count | None
    bytes: Count
    reused_bytes: Count | None
    new_bytes: Count | None
    room_bytes: Count
    seconds: float | None
    read_bytes_per_s: Count | None
    write_bytes_per_s: Count | None
    download_bytes: Count = 0
    kept_bytes: Count = 0
    source: str | None = None


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
    """The head of one subject, the names of its tensors, and its size.

    What is not `computed` is kept and exported, and no answer depends on it: a layer that predicts
    further tokens.
    """

    block: str
    tensors: list[str]
    bytes: Count
    computed: bool


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
