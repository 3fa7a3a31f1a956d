"""What a request asks a model for: its prompt as tokens, how to sample, and where to end."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from blyan_node.moe.generation_config import default_sampling
from blyan_node.moe.harmony import Harmony
from blyan_node.moe.sampling import ALLOWED, Sampler, Sampling
from blyan_node.services.models import Description
from blyan_node.services.speech import HarmonySpeech, PlainSpeech, Speech
from blyan_node.services.texts import TextProcess
from blyan_node.services.writer import Ends
from protocols.errors import ErrorCode, Refused
from protocols.rpc.generate import GenerateRequest, SamplingUsed

HARMONY_FAMILY = "gpt_oss"


@dataclass(frozen=True)
class Question:
    """A request in the model's own terms. `speech` None: it has no tokenizer, and no text."""

    prompt: Sequence[int]  # at least one
    speech: Speech | None
    sampler: Sampler
    ends: Ends

    @property
    def used(self) -> SamplingUsed:
        """The settings, as the result says them."""
        sampling = self.sampler.sampling
        seed = self.sampler.seed if sampling.temperature else None
        return SamplingUsed(**asdict(sampling), seed=seed)


async def question(
    request: GenerateRequest, model: Description, text: TextProcess | None
) -> Question:
    """Reads a request to `model`, whose text side is `text`. Raises `Refused` for a bad one."""
    if text is None and (request.prompt_ids is None or request.stop):
        raise Refused(
            ErrorCode.BAD_INPUT,
            f"the model {model.name} takes and gives token ids only",
            "it was published without a tokenizer",
            "Give --prompt-ids, and no --stop.",
        )
    prompt = await _prompt(request, text)
    sampler = Sampler(
        sampling(request, default_sampling(model.files)),
        secrets.randbits(63) if request.seed is None else request.seed,
    )
    sampler.see(prompt)
    tokens = frozenset() if request.ignore_eos else model.stop_ids
    most = min(request.max_tokens, room_for(len(prompt), 1, model))
    ends = Ends(most, tokens, request.stop)
    speech = None if text is None else _speech(_messages(request) is not None, model, text)
    return Question(prompt, speech, sampler, ends)


def sampling(request: GenerateRequest, default: Sampling) -> Sampling:
    """The request's settings, and where it says nothing the model's."""
    said = {name: getattr(request, name) for name in ALLOWED}
    return replace(default, **{name: value for name, value in said.items() if value is not None})


def room_for(tokens: int, new: int, model: Description) -> int:
    """How many tokens may follow `tokens` of a prompt. Raises `Refused` if not even `new` may."""
    most = model.config.context
    if tokens + new <= most:
        return most - tokens
    raise Refused(
        ErrorCode.BAD_INPUT,
        f"the prompt is too long for {model.name}",
        f"it has {tokens} tokens, and the model reads {most} at most, answer included",
        "Give a shorter prompt, or begin a new conversation.",
        {"model": model.name, "tokens": tokens, "tokens_max": most},
    )


def _speech(chat: bool, model: Description, text: TextProcess) -> Speech:
    reader = Harmony.of(text.special) if chat and model.config.family == HARMONY_FAMILY else None
    return PlainSpeech(text) if reader is None else HarmonySpeech(text, reader)


async def _prompt(request: GenerateRequest, text: TextProcess | None) -> Sequence[int]:
    if request.prompt_ids is not None:
        return request.prompt_ids
    assert text is not None
    messages = _messages(request)
    if messages is not None:
        ids = await text.chat(messages, request.reasoning_effort)
    else:
        assert request.prompt is not None
        ids = await text.encode(request.prompt)
    if not ids:
        raise Refused(ErrorCode.BAD_INPUT, "the prompt is empty", "it has no token to go on from")
    return ids


def _messages(request: GenerateRequest) -> Sequence[Mapping[str, Any]] | None:
    """The conversation that the chat template is to render, None for a plain prompt."""
    if request.messages is not None:
        return [{"role": one.role, "content": one.content} for one in request.messages]
    if request.chat:
        return [{"role": "user", "content": request.prompt}]
    return None
