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


class PublishRequest(Request):
    """`path` is a Hugging Face directory; with `wait_replicas` the answer waits for holders."""

    path: PathText
    name: NewName
    wait_replicas: Replicas | None = None


class PublishResult(Result):
    """Counts of new blocks, of the model's experts, its bytes, and those that were there already."""

    model: str
    name: str
    root: str
    blocks: Count
    experts: Count
    bytes: Count
    reused_bytes: Count


class ListRequest(Request):
    """No parameters."""


class ModelInfo(Result):
    """One model; `held` counts its experts that have a live holder."""

    name: str
    model: str
    author: str
    family: str
    root: str
    experts: Count
    held: Count
    bytes: Count


class ListResult(Result):
    """Every model that the node knows whole."""

    models: list[ModelInfo]


class ShowRequest(Request):
    """Which model."""

    model: ModelName


class SubjectInfo(Result):
    """The head of one subject, the names of its tensors, and its size."""

    block: str
    tensors: list[str]
    bytes: Count


class ShowResult(ModelInfo):
    """A model with the head of each subject."""

    subjects: dict[str, SubjectInfo]


class FetchRequest(Request):
    """Which model, and at which root."""

    model: ModelName
    root: RootText | None = None


class FetchResult(Result):
    """What the fetch brought; blocks that were stored before are not counted."""

    blocks: Count
    bytes: Count


class VerifyRequest(Request):
    """Which model."""

    model: ModelName


class BadBlock(Result):
    """A block of a model that does not check, and why."""

    subject: str
    block: str
    why: str


class VerifyResult(Result):
    """`ok` if every byte of every block is stored here and right."""

    ok: bool
    blocks: Count
    bytes: Count
    bad: list[BadBlock]


class WaitRequest(Request):
    """Answers once every expert of the model has this many live holders."""

    model: ModelName
    replicas: Replicas


class WaitResult(Result):
    """The smallest number of live holders over the model's experts."""

    replicas: Count


class ExportRequest(Request):
    """`out` must not exist, or be an empty directory."""

    model: ModelName
    out: PathText
    root: RootText | None = None


class ExportResult(Result):
    """Where the Hugging Face directory is, and what it holds."""

    path: str
    files: Count
    bytes: Count


class UpdateRequest(Request):
    """`weights` is a safetensors file; `base` the head that it replaces (the current one if None)."""

    model: ModelName
    subject: SubjectText
    weights: PathText
    base: BlockText | None = None


class UpdateResult(Result):
    """The new head of the subject, what it replaced, and the model's new root."""

    subject: str
    block: str
    base: str
    root: str
