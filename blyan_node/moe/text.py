"""Between text and token ids: the tokenizer, the chat template, and text as it streams.

Everything comes from the files that travel with the model, which a stranger may have written:
they are read under limits, and what is malformed is refused. What they may cost is bounded by
`blyan_node.moe.text_process`, in which a node has its texts made.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from blyan_node.moe.chat import chat_template
from blyan_node.moe.strict_json import refuse
from protocols import limits
from protocols.errors import ErrorCode, Refused

_REPLACEMENT = "\ufffd"
_HELD_TOKENS_MAX = 8  # that bring nothing whole: a character has at most four bytes
_WINDOW_TOKENS_MAX = 64  # each of which may end inside a character


class Text:
    """A model's tokenizer and chat template."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Reads `files`; raises `Refused` (BAD_MODEL) for a tokenizer that cannot be read."""
        data = files["tokenizer.json"]
        if len(data) > limits.model_file_bytes_max:
            refuse(f"tokenizer.json has {len(data)} bytes")
        try:
            self._tokenizer = Tokenizer.from_str(data.decode())
        except Exception as error:  # the only type that tokenizers raises
            refuse(f"tokenizer.json: {str(error)[:200]}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = chat_template(files)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = {token.content: id for id, token in added.items() if token.special}

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt, with what the tokenizer itself puts around it."""
        return self._encode(prompt, special=True)

    def chat(self, messages: Sequence[Mapping[str, Any]], effort: str | None = None) -> list[int]:
        """The ids of a conversation that the model is to answer, by its chat template.

        Raises `Refused`: BAD_INPUT if there is no template, if it refuses these messages, or if it
        does not ask for an `effort`.
        """
        if self._template is None:
            raise Refused(
                ErrorCode.BAD_INPUT,
                "no chat",
                "this model has no chat template",
                "Give the prompt as plain text",
            )
        return self._encode(self._template.render(messages, effort), special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if len(text.encode(errors="replace")) > limits.prompt_bytes_max:
            raise Refused(
                ErrorCode.BAD_INPUT, "the prompt is too long",
                f"at most {limits.prompt_bytes_max} bytes are taken",
            )  # fmt: skip
        try:
            return self._tokenizer.encode(text, add_special_tokens=special).ids
        except Exception as error:  # the only type that tokenizers raises; also lone surrogates
            raise Refused(ErrorCode.BAD_INPUT, "the prompt", str(error)[:200]) from None


class Windows:
    """Text as tokens arrive: whole characters only, and together what `Text.decode` gives.

    A token may end inside a character, and some tokenizers write a token differently at the start
    of a text. So a window of recent tokens is decoded before and after the new one, and what was
    added is passed on up to an incomplete character. Bytes that are no text at all are held for a
    few tokens and then passed on as U+FFFD. Special tokens have no text and are not to be added.
    Who decodes is the caller's affair.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []  # the window
        self._told = 0  # tokens of it whose text was passed on
        self._shown = 0  # characters that were passed on of the tokens after these
        self._waited = 0  # tokens that brought nothing whole

    def add(self, token: int) -> tuple[Sequence[int], Sequence[int]]:
        """Takes a token; what to decode: the window without what is new, and with it."""
        self._ids.append(token)
        return self.now()

    def now(self) -> tuple[Sequence[int], Sequence[int]]:
        """The same without a new token."""
        return self._ids[: self._told], self._ids

    @property
    def holds(self) -> bool:
        """Whether there are tokens whose text was not passed on."""
        return len(self._ids) > self._told

    def take(self, before: str, after: str, *, last: bool = False) -> str:
        """The text to pass on, often a piece of a word; all that is held if no token follows."""
        fresh = after[len(before) :]
        whole = fresh.rstrip(_REPLACEMENT) if after.startswith(before) else ""
        held = len(self._ids) - self._told
        if self._waited + 1 >= _HELD_TOKENS_MAX or held >= _WINDOW_TOKENS_MAX:
            last = True
        if whole == fresh or last:
            piece = fresh[self._shown :]
            self._move(fresh, before)
            return piece
        piece = whole[self._shown :]
        self._shown = max(self._shown, len(whole))
        self._waited = 0 if piece else self._waited + 1
        return piece

    def _move(self, fresh: str, before: str) -> None:
        """All was passed on; the tokens that said the last of it are what comes before the next.

        What says nothing after a text is forgotten. At the start of one it is not: it may be what
        another token there would have been written without, as a space is.
        """
        if fresh:
            self._ids = self._ids[self._told :]
        elif before or len(self._ids) > _WINDOW_TOKENS_MAX:
            del self._ids[self._told :]
        self._told, self._shown, self._waited = len(self._ids), 0, 0
