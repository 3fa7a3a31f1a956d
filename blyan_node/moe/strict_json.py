"""JSON from strangers, read field by field: what is not understood is refused by name."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from protocols import limits
from protocols.errors import ErrorCode, Refused

# Training, generation defaults and bookkeeping: no effect on the logits.
INERT = frozenset(
    {
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "_name_or_path",
        "_commit_hash",
    }
)


def refuse(why: str, **data: object) -> NoReturn:
    """Raises the refusal of a model, with what to do next."""
    raise Refused(
        ErrorCode.BAD_MODEL,
        "this model cannot be read",
        why.encode(errors="backslashreplace").decode(),
        "Give a complete Hugging Face directory of a supported family (docs/models.md)",
        data,
    )


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object without repeated keys or non-finite numbers; raises `Refused` (BAD_MODEL)."""
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        refuse(f"{where}: {str(error)[:120]}")
    if not isinstance(value, dict):
        refuse(f"{where}: not an object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key[:80]!a} occurs twice")
        found[key] = value
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def token_ids(value: object, where: str) -> tuple[int, ...]:
    """One token id, a list of them, or null, as a tuple; raises `Refused` (BAD_MODEL)."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(one) is not int or not 0 <= one < limits.vocab_max for one in ids):
        refuse(f"{where} is {show(value)}, expected token ids")
    return tuple(ids)


class Fields:
    """The fields of one JSON object; what is never taken and not inert is refused."""

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json") -> None:
        self._left = dict(fields)
        self._where = where

    def take(self, name: str, default: Any) -> Any:
        """The value of a field, which counts as understood."""
        return self._left.pop(name, default)

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self._left.get(name) is not None

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raises the refusal of one field."""
        refuse(f"{self._where}: {name} {why}", field=name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`."""
        value = _first(self.take(name, None), default)
        if type(value) is not int or not low <= value <= high:
            self.refuse(name, f"is {show(value)}, expected a whole number from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`."""
        value = _first(self.take(name, None), default)
        if type(value) not in (int, float) or not low <= value <= high:
            self.refuse(name, f"is {show(value)}, expected a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.take(name, default)
        if type(value) is not bool:
            self.refuse(name, f"is {show(value)}, expected true or false")
        return value

    def only(self, name: str, allowed: object, default: object) -> None:
        """Refuses any other value than `allowed`."""
        value = self.take(name, default)
        if type(value) is not type(allowed) or value != allowed:
            self.refuse(name, f"is {show(value)}, this version computes only {allowed!r}")

    def nested(self, name: str) -> "Fields | None":
        """The fields of an object in a field, None if it is not there."""
        value = self.take(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.refuse(name, "is not an object")
        return Fields(value, f"{self._where}: {name}")

    def check_rest(self) -> None:
        """Refuses what was never taken and may change the mathematics."""
        for name, value in self._left.items():
            if name not in INERT and value is not None:
                self.refuse(
                    ascii(name[:80]), "is unknown to this version and may change the mathematics"
                )


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def show(value: object) -> str:
    """A value as an error message quotes it."""
    return "missing" if value is None else repr(value)[:40]
