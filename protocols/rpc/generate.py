"""`generate.run` and `forward.run`: answers, token by token or as one pass."""

from typing import Annotated, Literal

from msgspec import Meta

from protocols import limits
from protocols.precision import Precision
from protocols.rpc.fields import Count, ModelName, PathText, Request, Result, RootText, TokenIds

Prompt = Annotated[str, Meta(max_length=limits.prompt_bytes_max, description="The prompt as text")]
PromptIds = Annotated[TokenIds, Meta(min_length=1, description="The prompt as token ids")]
Demanded = Annotated[
    Precision,
    Meta(description="Compute in this precision throughout; the node's own if left out"),
]
StopString = Annotated[str, Meta(min_length=1, max_length=limits.stop_string_chars_max)]


class Message(Request, frozen=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Meta(max_length=limits.prompt_bytes_max)]


class GenerateRequest(Request, frozen=True):
    """One of `prompt`, `prompt_ids` and `messages`, which the model's chat template makes a prompt.

    A sampling setting that is left out is the model's own: that of its generation_config.json if
    its `do_sample` is true, else temperature 0. `sampling` of the result says what was used.
    """

    model: ModelName
    prompt: Prompt | None = None
    prompt_ids: PromptIds | None = None
    messages: (
        Annotated[
            list[Message],
            Meta(
                min_length=1,
                max_length=limits.chat_messages_max,
                description="A conversation to go on with",
            ),
        ]
        | None
    ) = None
    max_tokens: Annotated[
        int, Meta(ge=1, le=limits.generate_tokens_max, description="Tokens to make at most")
    ] = 128
    temperature: (
        Annotated[float, Meta(ge=0, le=limits.temperature_max, description="0 is greedy")] | None
    ) = None
    top_k: (
        Annotated[
            int,
            Meta(ge=0, le=limits.vocab_max, description="Sample from so many tokens, 0 from all"),
        ]
        | None
    ) = None
    top_p: (
        Annotated[
            float,
            Meta(gt=0, le=1, description="Sample from the likeliest tokens of this total share"),
        ]
        | None
    ) = None
    min_p: (
        Annotated[
            float,
            Meta(ge=0, le=1, description="Sample from tokens this likely beside the likeliest"),
        ]
        | None
    ) = None
    repetition_penalty: (
        Annotated[
            float,
            Meta(
                gt=0,
                le=limits.repetition_penalty_max,
                description="Make tokens that were there before less likely; 1 is without",
            ),
        ]
        | None
    ) = None
    seed: (
        Annotated[int, Meta(ge=0, le=2**63 - 1, description="The same seed gives the same tokens")]
        | None
    ) = None
    stop: Annotated[
        tuple[StopString, ...],
        Meta(
            max_length=limits.stop_strings_max,
            description="Text that ends the answer, and is not part of it",
        ),
    ] = ()
    root: RootText | None = None
    precision: Demanded | None = None
    chat: Annotated[bool, Meta(description="Put the prompt into the model's chat template")] = False
    reasoning_effort: (
        Annotated[
            Literal["low", "medium", "high"],
            Meta(description="How long the model is to think, if its chat template asks for it"),
        ]
        | None
    ) = None
    ignore_eos: Annotated[bool, Meta(description="Go on after the model's stop tokens")] = False

    def __post_init__(self) -> None:
        given = [one for one in (self.prompt, self.prompt_ids, self.messages) if one is not None]
        if len(given) != 1:
            raise ValueError("exactly one of `prompt`, `prompt_ids` and `messages` is needed")
        if self.chat and self.prompt_ids is not None:
            raise ValueError("`chat` needs a `prompt` of text")
        if self.reasoning_effort is not None and not (self.chat or self.messages):
            raise ValueError("`reasoning_effort` needs `chat` or `messages`")


class Token(Result, frozen=True):
    """One token as it comes; `text` is what it adds to the answer, null without a tokenizer.

    `text` is "" while a character is not whole or a stop string may have begun. `reasoning` is what
    it adds to that instead, in the same way.
    """

    token_id: int
    text: str | None
    reasoning: str | None = None


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


class SamplingUsed(Result, frozen=True):
    """The settings of an answer; `seed` is null at temperature 0, where nothing is drawn."""

    temperature: float
    top_k: Count
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None


class GenerateResult(Result, frozen=True):
    """`text` is null for a model without a tokenizer; `trace` goes by subject.

    `text` ends before the stop string that ended it, `token_ids` are all that were made.
    `reasoning` is what a gpt_oss model said in other channels than the final one, null for others.
    `profile` is the numeric profile of every row of the trace, and of the rest.
    """

    token_ids: list[int]
    text: str | None
    root: str
    finish: Literal["length", "stop", "cancelled"]
    sampling: SamplingUsed
    trace: Trace
    stats: GenerateStats
    profile: str
    reasoning: str | None = None


class ForwardRequest(Request, frozen=True):
    """One pass over a prompt; `out` is the safetensors file to write."""

    model: ModelName
    prompt_ids: PromptIds
    out: PathText
    root: RootText | None = None
    precision: Demanded | None = None


class ForwardResult(Result, frozen=True):
    """`out` has `logits` float32 [tokens, vocab] and `layerL.experts` int64 [tokens, top_k].

    `profile` is the numeric profile of all of it.
    """

    out: str
    root: str
    trace: Trace
    stats: GenerateStats
    profile: str
