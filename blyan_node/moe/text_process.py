"""The text side of one model in a process of its own, with bounded memory and time.

A tokenizer or a chat template comes from whoever published the model, and either can be written
so that it never ends or doubles a string until memory is gone; the tokenizer's library then aborts
its process. So both run here and not in the daemon: `python -m blyan_node.moe.text_process` reads
frames on its stdin and answers each on its stdout (`blyan_node.services.texts` is the other end).
A frame is its length in 4 bytes, big-endian, and that much msgpack. The first one is `Open`. The
process ends when its stdin does, when one request takes longer than `limits.text_s_max`, and when
a library wants more memory than `limits.text_process_bytes_max`.
"""

import os
import resource
import signal
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import msgspec

from blyan_node.moe.text import Text
from protocols import limits
from protocols.errors import ErrorCode, Refused

LENGTH_BYTES = 4
# What the process reads of a model's files.
NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)
_PATIENCE_S = 5  # the daemon gives up first


class Open(msgspec.Struct, tag=True, frozen=True):
    """Read these files; answered with `Opened` or `Refusal`."""

    files: dict[str, bytes]


class Encode(msgspec.Struct, tag=True, frozen=True):
    """The ids of a prompt; answered with `Ids`."""

    prompt: str


class Chat(msgspec.Struct, tag=True, frozen=True):
    """The ids of a conversation, by the chat template; answered with `Ids`."""

    messages: list[dict[str, Any]]
    effort: str | None = None


class Decode(msgspec.Struct, tag=True, frozen=True):
    """The texts of some lists of ids; answered with `Decoded`."""

    parts: list[list[int]]


class Opened(msgspec.Struct, tag=True, frozen=True):
    """The files were read; the ids of the tokenizer's special tokens."""

    special: dict[str, int]


class Ids(msgspec.Struct, tag=True, frozen=True):
    """Token ids."""

    ids: list[int]


class Decoded(msgspec.Struct, tag=True, frozen=True):
    """One text for each list that was asked for."""

    texts: list[str]


class Refusal(msgspec.Struct, tag=True, frozen=True):
    """A `Refused` on its way."""

    code: int
    what: str
    why: str
    next: str
    data: dict[str, Any]


Request = Open | Encode | Chat | Decode
Answer = Opened | Ids | Decoded | Refusal


def text_files(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of a model's files that `Open` takes."""
    return {name: files[name] for name in NAMES if name in files}


def frame(message: Request | Answer) -> bytes:
    """A message as it travels."""
    data = msgspec.msgpack.encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def main() -> None:
    """Answers until stdin ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then closes us
    if sys.platform == "linux":  # elsewhere the time is what bounds it
        most = limits.text_process_bytes_max
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    serve(sys.stdin.buffer, sys.stdout.buffer)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Reads requests from `source` and answers on `sink` until `source` ends."""
    text: Text | None = None
    while (request := _read(source)) is not None:
        signal.alarm(limits.text_s_max + _PATIENCE_S)  # kills us even inside of a library
        try:
            if isinstance(request, Open):
                text = Text(request.files)
                answer = frame(Opened(text.special))
            else:
                assert text is not None, "the first request is `Open`"
                answer = frame(_answer(text, request))
        except Refused as refused:
            answer = frame(_refusal(refused))
        except MemoryError:
            answer = frame(_refusal(too_much("more memory than it may have")))
        signal.alarm(0)
        sink.write(answer)
        sink.flush()


def too_much(why: str) -> Refused:
    """A tokenizer or a template that wants more than it may have."""
    return Refused(
        ErrorCode.BAD_MODEL,
        "the model's tokenizer or chat template cannot be used",
        f"it takes {why}",
        "Ask the model's author to publish it again.",
    )


def _answer(text: Text, request: Encode | Chat | Decode) -> Ids | Decoded:
    if isinstance(request, Encode):
        return _ids(text.encode(request.prompt))
    if isinstance(request, Chat):
        return _ids(text.chat(request.messages, request.effort))
    texts = [text.decode(part) for part in request.parts]
    if sum(map(len, texts)) * 4 > limits.text_answer_bytes_max // 2:
        raise too_much("too many characters to say a few tokens")
    return Decoded(texts)


def _ids(ids: list[int]) -> Ids:
    if len(ids) > limits.prompt_tokens_max:
        raise Refused(
            ErrorCode.BAD_INPUT,
            "the prompt is too long",
            f"it has {len(ids)} tokens, at most {limits.prompt_tokens_max} are taken",
        )
    return Ids(ids)


def _refusal(refused: Refused) -> Refusal:
    # In ASCII: a template may put lone surrogates into what it refuses with.
    what, why, following = (
        part.encode("ascii", "backslashreplace").decode()
        for part in (refused.what, refused.why, refused.next)
    )
    return Refusal(int(refused.code), what, why, following, dict(refused.data))


def _read(source: BinaryIO) -> Request | None:
    length = source.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    data = source.read(int.from_bytes(length, "big"))
    request: Request = msgspec.msgpack.decode(data, type=Request)
    return request


if __name__ == "__main__":
    main()
