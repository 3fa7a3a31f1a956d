"""Chat templates: jinja in a sandbox, with the names that published templates use.

These are the names of `transformers`: `messages`, `tools` and `documents` (none here),
`add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, `dict`, the filter
`tojson`, loop controls, and the tag `generation`, which only marks what was answered; and if it is
asked for, `reasoning_effort`.

A template comes from whoever published the model. It sees the messages, the special tokens and a
few pure functions; it cannot change what it is given or reach Python's objects. The lines that it
executes and what it writes are counted, and the shortest ways to fill the memory are closed; what
remains is bounded by the process in which templates run (`blyan_node.moe.text_process`).
"""

import datetime
import json
import string
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from blyan_node.moe.strict_json import parse_json, refuse
from protocols import limits
from protocols.errors import ErrorCode, Refused

# What `strftime_now` says: the same on every node and on every day, so that a prompt has one form.
TEMPLATE_DATE = datetime.datetime(2025, 1, 1)
EFFORT = "reasoning_effort"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Methods and filters whose result is as long as a number says.
_WIDENING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
_WIDENING_FILTERS = ("center", "format", "indent", "wordwrap", "batch", "slice")
_RANDOM_FILTERS, _RANDOM = ("random",), ("lipsum",)  # a prompt has one form, wherever it is made


class _Exhausted(Exception):
    """A template ran for longer than it may."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what is inside, as it is."""

    tags: set[str] = {"generation"}  # noqa: RUF012  (as jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements up to the end tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template with the special tokens that it may name."""

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Compiles `source`; raises `Refused` (BAD_MODEL) if it is no template."""
        extensions: list[str | type[Extension]] = [loopcontrols, _Generation]
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        for name in (*_WIDENING_FILTERS, *_RANDOM_FILTERS):
            del environment.filters[name]
        for name in _RANDOM:
            del environment.globals[name]
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = TEMPLATE_DATE.strftime
        try:
            self._template = environment.from_string(source)
            names = environment.parse(source).find_all(nodes.Name)
        except (jinja2.TemplateError, RecursionError, ValueError) as error:
            refuse(f"chat template: {str(error)[:200]}")
        self._special = dict(special)
        self._asks_effort = any(name.name == EFFORT for name in names)

    def render(self, messages: Sequence[Mapping[str, Any]], effort: str | None = None) -> str:
        """The prompt for the answer to `messages`; raises `Refused` (BAD_INPUT).

        `effort` is how long the model is to think, for a template that asks for it.
        """
        if effort is not None and not self._asks_effort:
            raise Refused(
                ErrorCode.BAD_INPUT,
                f"no {EFFORT}",
                "this model's chat template does not ask for it",
                "Leave it out.",
            )
        values = {
            **({} if effort is None else {EFFORT: effort}),
            **self._special,
            "messages": list(messages),
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
        }
        pieces, size = [], 0
        try:
            with _Budget(limits.template_lines_max):
                for piece in self._template.generate(values):
                    size += len(piece)
                    if size > limits.prompt_bytes_max:
                        raise _Exhausted("it writes too much")
                    pieces.append(piece)
        except Exception as error:  # a template can raise any type by what it does with values
            raise Refused(
                ErrorCode.BAD_INPUT, "the chat template refuses these messages", str(error)[:200]
            ) from None
        return "".join(pieces)


def chat_template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """The template among a model's files, None if there is none."""
    settings: dict[str, Any] = {}
    if "tokenizer_config.json" in files:
        settings = parse_json(files["tokenizer_config.json"], "tokenizer_config.json")
    source = settings.get("chat_template")
    if "chat_template.jinja" in files:
        try:
            source = files["chat_template.jinja"].decode()
        except UnicodeDecodeError:
            refuse("chat_template.jinja is not UTF-8")
    if isinstance(source, list):  # several by name
        named = [s.get("template") for s in source if isinstance(s, dict)
                 and s.get("name") == "default"]  # fmt: skip
        source = named[0] if named else None
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > limits.template_bytes_max:
        refuse("chat template: no text, or too long")
    return ChatTemplate(source, _special_tokens(settings))


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, without the short ways to make something huge."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int | float) and isinstance(right, int | float):
            allowed = abs(left) < 1 << 32 and abs(right) < (64 if operator == "**" else 1 << 32)
        else:
            allowed = operator == "*" and _repeated(left, right) <= limits.template_bytes_max
        if not allowed:
            raise jinja2.TemplateRuntimeError(f"{operator} of these values is not allowed")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in _WIDENING and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` of fields as they are: what a field may ask for widens too."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ != "format":
            return None

        def plain(*values: Any, **named: Any) -> str:
            for _, _, form, conversion in string.Formatter().parse(value.__self__):
                if form or conversion:
                    raise jinja2.TemplateRuntimeError(f"the form {form!r} is not allowed")
            return wrapped(*values, **named)

        return plain


def _repeated(left: Any, right: Any) -> float:
    """The length of a sequence times a number, infinite for anything else."""
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * times
    return float("inf")


class _Budget:
    """Raises `_Exhausted` inside the `with` block after a number of executed lines."""

    def __init__(self, lines: int) -> None:
        self._left = lines
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        sys.settrace(self._count)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _count(self, frame: FrameType, event: str, argument: object) -> Any:
        self._left -= 1
        if self._left < 0:
            raise _Exhausted("it runs for too long")
        return self._count


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise jinja2.TemplateRuntimeError("indent")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
