"""Harmony from its tokens: which of them are said, and in which channel."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blyan_node.moe.harmony import MARKS, Begins, Harmony, Says

CONSTRAIN = "<|constrain|>"
SPECIAL = {name: 1000 + 7 * number for number, name in enumerate([*MARKS, CONSTRAIN, "<|pad|>"])}
WORDS = [
    "analysis",
    "commentary",
    "final",
    "assistant",
    "to=functions.x",
    "json",
    "Hm",
    "Paris",
    "!",
]
IDS: Mapping[str, int] = SPECIAL | {word: number for number, word in enumerate(WORDS)}
NAMES = {number: name for name, number in IDS.items()}


def read(answer: str) -> list[tuple[str, str]]:
    """(channel, what was said in it) of an answer whose tokens are words."""
    reader = Harmony.of(SPECIAL)
    assert reader is not None
    parts: list[tuple[str, list[str]]] = [("", [])]
    for word in answer.split():
        match reader.take(IDS[word]):
            case Begins(channel):
                parts.append((" ".join(NAMES[token] for token in channel), []))
            case Says(token):
                parts[-1][1].append(NAMES[token])
    return [(channel, " ".join(said)) for channel, said in parts if said]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<|channel|> analysis <|message|> Hm <|end|> <|start|> assistant <|channel|> final "
         "<|message|> Paris ! <|return|>", [("analysis", "Hm"), ("final", "Paris !")]),
        ("<|channel|> final <|message|> Paris", [("final", "Paris")]),
        ("<|message|> Paris <|return|>", [("", "Paris")]),
        ("<|channel|> commentary to=functions.x <|constrain|> json <|message|> Hm <|call|>",
         [("commentary to=functions.x", "Hm")]),
        ("<|channel|> final <|constrain|> json <|message|> Paris <|return|>",
         [("final", "Paris")]),
        ("<|channel|> final <|message|> Paris <|channel|> analysis <|message|> Hm",
         [("final", "Paris"), ("analysis", "Hm")]),
        ("<|channel|> analysis <|message|> final <|end|> <|start|> assistant <|message|> Paris",
         [("analysis", "final"), ("", "Paris")]),
        ("Paris ! <|return|>", [("", "Paris !")]),
        ("<|channel|> analysis <|message|> Hm <|end|> Paris", [("analysis", "Hm"), ("", "Paris")]),
        ("<|channel|> final <|message|> Paris <|pad|> ! <|return|> Hm",
         [("final", "Paris !"), ("", "Hm")]),
        ("<|channel|> analysis", []),
        ("<|start|> assistant to=functions.x <|channel|> commentary <|message|> Hm",
         [("commentary", "Hm")]),
    ],
)  # fmt: skip
def test_what_is_said_where(answer: str, expected: list[tuple[str, str]]) -> None:
    assert read(answer) == expected


@given(st.lists(st.sampled_from(sorted(IDS)), max_size=40))
def test_any_tokens_are_read(words: list[str]) -> None:
    """Every plain token is said, or is part of a header; no special one is said."""
    said = read(" ".join(words))
    assert not any(name in " ".join(text.split()) for _, text in said for name in SPECIAL)
    plain, header = 0, False
    for word in words:
        if word in ("<|start|>", "<|channel|>"):
            header = True
        elif word in ("<|message|>", "<|end|>", "<|return|>", "<|call|>"):
            header = False
        elif word not in SPECIAL and not header:
            plain += 1
    assert sum(len(text.split()) for _, text in said) == plain


@pytest.mark.parametrize("missing", MARKS)
def test_a_tokenizer_without_a_mark_has_no_harmony(missing: str) -> None:
    assert Harmony.of({name: id for name, id in SPECIAL.items() if name != missing}) is None
