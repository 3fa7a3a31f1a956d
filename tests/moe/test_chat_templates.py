"""Each family's kind of chat template, in the sandbox: the prompt that transformers makes of it.

The templates of `tests/templates` do with jinja what the published ones do, in other words.
"""

import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from blyan_node.moe.chat import TEMPLATE_DATE
from blyan_node.moe.families import FAMILIES
from blyan_node.moe.text import Text
from protocols.errors import ErrorCode, Refused

TEMPLATES = Path(__file__).parents[1] / "templates"
SPECIAL = [
    "<unk>", "<s>", "</s>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>",
    "<|call|>", "<|im_start|>", "<|im_end|>",
    "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend▁of▁sentence\uff5c>",
]  # fmt: skip
USER = {"role": "user", "content": 'What is "größer" than <b>2</b>?'}
ANSWER = {"role": "assistant", "content": " Three.\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThree."}
SYSTEM = {"role": "system", "content": "Be brief & kind."}
AGAIN = {"role": "user", "content": "日本 🎉"}
CONVERSATIONS = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, AGAIN],
    "all": [SYSTEM, USER, ANSWER, AGAIN, THOUGHT, USER],
    "developer": [{**SYSTEM, "role": "developer"}, USER],
    "two questions": [USER, AGAIN],
    "the model begins": [ANSWER, USER],
    "empty": [{"role": "user", "content": ""}],
    "marks": [USER, {"role": "assistant", "content": "<|channel|>final<|message|>x"}, AGAIN],
}


def tokenizer() -> Tokenizer:
    """Every byte a token, and the marks of every family."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL, *alphabet]
    built = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(SPECIAL)
    return built


@pytest.fixture(autouse=True)
def one_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day on which our templates are rendered, for transformers too."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return TEMPLATE_DATE

    monkeypatch.setattr(chat_template_utils, "datetime", Fixed)


def theirs(source: str, messages: list[dict[str, str]], **values: Any) -> list[int] | None:
    """The ids, None if the template refuses."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    try:
        ids: list[int] = fast.apply_chat_template(
            messages, chat_template=source, add_generation_prompt=True, return_dict=False, **values
        )
    except Exception:  # whatever the template raised
        return None
    return ids


def ours(
    source: str, messages: list[dict[str, str]], effort: str | None = None
) -> list[int] | None:
    settings = b'{"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}'
    text = Text(
        {
            "tokenizer.json": tokenizer().to_str().encode(),
            "tokenizer_config.json": settings,
            "chat_template.jinja": source.encode(),
        }
    )
    try:
        return text.chat(messages, effort)
    except Refused as refused:
        assert refused.code is ErrorCode.BAD_INPUT
        return None


def test_every_family_has_one() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_prompts_are_those_of_transformers(family: str, messages: list[dict[str, str]]) -> None:
    source = (TEMPLATES / f"{family}.jinja").read_text()
    assert ours(source, messages) == theirs(source, messages)


@pytest.mark.parametrize(
    ("family", "conversation", "refused"),
    [
        ("mixtral", "turns", False), ("mixtral", "two questions", True),
        ("mixtral", "the model begins", True), ("gpt_oss", "two questions", False),
        ("gpt_oss", "marks", True), ("gpt_oss", "developer", False), ("qwen3_moe", "all", False),
        ("deepseek_v3", "all", False), ("olmoe", "all", False),
    ],
)  # fmt: skip
def test_what_templates_refuse_is_refused(family: str, conversation: str, refused: bool) -> None:
    """That the comparison above compares prompts, and not two refusals."""
    source = (TEMPLATES / f"{family}.jinja").read_text()
    assert (ours(source, CONVERSATIONS[conversation]) is None) == refused


def test_the_thoughts_of_earlier_answers_are_left_out() -> None:
    for family in ("qwen3_moe", "deepseek_v3"):
        source = (TEMPLATES / f"{family}.jinja").read_text()
        with_thought = ours(source, [USER, THOUGHT, AGAIN])
        plain = ours(source, [USER, {"role": "assistant", "content": "Three."}, AGAIN])
        expected = plain if family == "qwen3_moe" else ours(
            source, [USER, {"role": "assistant", "content": "\n\nThree."}, AGAIN]
        )  # fmt: skip
        assert with_thought == expected


@pytest.mark.parametrize("effort", ["low", "high"])
def test_gpt_oss_is_told_how_long_to_think(effort: str) -> None:
    source = (TEMPLATES / "gpt_oss.jinja").read_text()
    told = ours(source, [USER], effort)
    assert told == theirs(source, [USER], reasoning_effort=effort)
    assert told is not None and told != ours(source, [USER])


def test_a_template_that_asks_for_no_effort_is_told_of_none() -> None:
    source = (TEMPLATES / "qwen3_moe.jinja").read_text()
    assert ours(source, [USER]) is not None
    assert ours(source, [USER], "high") is None
