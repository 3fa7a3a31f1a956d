"""Options and arguments whose values a shell completes: methods, and what a node can tell.

Whatever goes wrong on the way (no node, a node that is busy, one that lies) offers nothing and says
nothing: a person who types has no use for an error.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import click
from click.shell_completion import CompletionItem

from cli.client import Client, NoNode
from cli.shared import Completions, describe, shared_of
from protocols.errors import Refused
from protocols.rpc.table import METHODS

ANSWER_S_MAX = 0.5
_PLAIN = re.compile(r"[A-Za-z0-9._@/-]+", re.ASCII)


def model_option(method: str, required: bool = False) -> Callable[[Any], Any]:
    """`--model N`, described by the table."""
    return click.option(
        "--model",
        metavar="N",
        required=required,
        help=describe(method, "model"),
        shell_complete=models,
    )


def methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """The methods of the RPC."""
    return _items(((row.name, row.summary) for row in METHODS.values()), incomplete)


def models(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """The models that the node knows; `name@id` where two authors use one name."""

    def listed() -> Iterable[tuple[str, str]]:
        found = _ask(context, "model.list", {})["models"]
        names = [model["name"] for model in found]
        for model in found:
            alone = names.count(model["name"]) == 1
            name = model["name"] if alone else f"{model['name']}@{model['model']}"
            yield name, f"{model['family']}, {model['experts']} experts"

    return _live(listed, incomplete)


def experts(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """The experts of the model that is named, or of the only one; those given are left out."""

    def listed() -> Iterable[tuple[str, str]]:
        model = context.params.get("model")
        found = _ask(context, "expert.list", {} if model is None else {"model": model})
        given = context.params.get(parameter.name or "") or ()
        for expert in found["experts"]:
            if expert["subject"] not in given:
                yield expert["subject"], f"{len(expert['holders'])} holders"

    return _live(listed, incomplete)


def subjects(context: click.Context, parameter: click.Parameter, incomplete: str) -> Completions:
    """The parts of the model that is named."""

    def listed() -> Iterable[tuple[str, str]]:
        model = context.params.get("model") or context.params.get("name")
        if model:
            for name in _ask(context, "model.show", {"model": model})["subjects"]:
                yield name, ""

    return _live(listed, incomplete)


def _ask(context: click.Context, method: str, params: dict[str, object]) -> Any:
    with Client(shared_of(context).socket, answer_s_max=ANSWER_S_MAX) as client:
        return client.call(method, params).result


def _live(listed: Callable[[], Iterable[tuple[str, str]]], incomplete: str) -> Completions:
    try:
        return _items(listed(), incomplete)
    except (NoNode, Refused, KeyError, TypeError):  # the last two: what answers is no node of ours
        return []


def _items(rows: Iterable[tuple[str, str]], incomplete: str) -> Completions:
    """Candidates that begin as the word does; none that a shell could take for something else."""
    return [
        CompletionItem(value, help=text or None)
        for value, text in rows
        if value.startswith(incomplete) and _PLAIN.fullmatch(value)
    ]
