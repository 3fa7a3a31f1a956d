"""`generate.run` and `forward.run`: answers, token by token or as one pass."""

from typing import Annotated, Literal

from msgspec import Meta

from protocols import limits
from protocols.rpc.fields import Count, ModelName, PathText, Request, Result, RootText, TokenIds

Prompt = Annotated[str, Meta(max_length=limits.prompt_bytes_max, description="The prompt as text")]
PromptIds = Annotated[TokenIds, Meta(min_length=1, description="The prompt as token ids")]


class GenerateRequest(Request, frozen=True):
    """One of `prompt` and `prompt_ids`; `chat` puts the prompt into the model's chat template."""

    model: ModelName
    prompt: Prompt | None = None
    prompt_ids: PromptIds | None = None
    max_tokens: Annotated[
        int, Meta(ge=1, le=limits.generate_tokens_max, description="Tokens to make at most")
    ] = 128
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 is greedy")] = 0.0
    top_p: Annotated[
        float, Meta(gt=0, le=1, description="Sample from the likeliest tokens of this total share")
    ] = 1.0
    seed: (
        Annotated[int, Meta(ge=0, le=2**63 - 1, description="The same seed gives the same tokens")]
        | None
    ) = None
    root: RootText | None = None
    chat: Annotated[bool, Meta(description="Use the model's chat template")] = False
    ignore_eos: Annotated[bool, Meta(description="Go on after the model's stop tokens")] = False

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ValueError("exactly one of `prompt` and `prompt_ids` is needed")
        if self.chat and self.prompt is None:
            raise ValueError("`chat` needs a `prompt` of text")


class Token(Result, frozen=True):
    """One token as it comes; `text` is what it adds, "" while a character is not whole."""

    token_id: int
    text: str | None


class TraceEntry(Result, frozen=True):
    """The block that stood for an expert, and the rows that each peer computed with it."""

    block: str
    peers: dict[str, int]


Trace = dict[str, TraceEntry]


class GenerateStats(Result, frozen=True):
    """Times in s, sizes in bytes; `max_gap_s` is the longest wait between two tokens."""

    prompt_tokens: Count
    new_tokens: Count
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    max_gap_s: float
    remote_calls: Count
    bytes_sent: Count
    bytes_received: Count
    retries: Count
    fetched_bytes: Count


class GenerateResult(Result, frozen=True):
    """`text` is None for a model without a tokenizer; `trace` goes by subject."""

    token_ids: list[int]
    text: str | None
    root: str
    finish: Literal["length", "stop", "cancelled"]
    trace: Trace
    stats: GenerateStats


class ForwardRequest(Request, frozen=True):
    """One pass over a prompt; `out` is the safetensors file to write."""

    model: ModelName
    prompt_ids: PromptIds
    out: PathText
    root: RootText | None = None


class ForwardResult(Result, frozen=True):
    """`out` has `logits` float32 [tokens, vocab] and `layerL.experts` int64 [tokens, top_k]."""

    out: str
    root: str
    trace: Trace
    stats: GenerateStats
