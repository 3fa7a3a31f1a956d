"""Text: templates that cannot do harm, files that are broken."""

import json
import random
from pathlib import Path

import pytest

from blyan_node.moe.chat import ChatTemplate, chat_template
from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.generation_config import stop_ids
from blyan_node.moe.text import Text
from blyan_node.testing.checkpoints import make_checkpoint
from protocols.errors import ErrorCode, Refused

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path: Path = make_checkpoint("mixtral", tmp_path_factory.mktemp("m") / "m", tokenizer=True)
    return dict(Checkpoint.open(path).files)


@pytest.fixture(scope="module")
def text(files: dict[str, bytes]) -> Text:
    return Text(files)


def test_chat_is_the_template_and_nothing_more(text: Text) -> None:
    ids = text.chat([*USER, {"role": "assistant", "content": "yo"}])
    assert ids == text.encode("<user>hi<eos><assistant>yo<eos><assistant>")
    assert ids.count(1) == 2


def test_stop_tokens(files: dict[str, bytes]) -> None:
    assert stop_ids(files) == {1}
    assert stop_ids({**files, "generation_config.json": b'{"eos_token_id": [5, 6]}'}) == {5, 6}
    assert stop_ids({**files, "generation_config.json": b"{}"}) == {1}
    assert stop_ids({}) == frozenset()
    with pytest.raises(Refused, match="eos_token_id"):
        stop_ids({"config.json": b'{"eos_token_id": -5}'})


def test_no_template_is_said(files: dict[str, bytes]) -> None:
    text = Text({**files, "tokenizer_config.json": b"{}"})
    with pytest.raises(Refused, match="no chat template"):
        text.chat(USER)


def test_where_templates_are_found(files: dict[str, bytes]) -> None:
    named = {"chat_template": [{"name": "tools", "template": "T"},
                               {"name": "default", "template": "{{ bos_token }}D"}],
             "bos_token": {"content": "<s>"}}  # fmt: skip
    found = chat_template({"tokenizer_config.json": json.dumps(named).encode()})
    assert found is not None and found.render(USER) == "<s>D"
    found = chat_template({"chat_template.jinja": b"F", "tokenizer_config.json": b"{}"})
    assert found is not None and found.render(USER) == "F"
    assert chat_template({}) is None


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "01 Jan 2025"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hi"}]'),
        ("{% for m in messages %}{% if m.role == 'x' %}{% break %}{% endif %}"
         "{{ m['content'].upper() }}{% endfor %}", "HI"),
        ("{{ '-' * 3 }}{{ 7 % 4 }}", "---3"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}!", "user!"),
        ("{{ '<{}|{name}>'.format(1, name='x') }}", "<1|x>"),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ dict(a=1) | tojson }}{{ tools is none }}{{ documents is none }}", '{"a": 1}TrueTrue'),
    ],
)  # fmt: skip
def test_what_templates_use(source: str, expected: str) -> None:
    assert ChatTemplate(source, {}).render(USER) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages }}{{ messages }}{{ messages }}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ range(10 ** 9) }}", "{{ 'a' * 10 ** 10 }}", "{{ 9 ** 99 ** 9 }}",
        "{{ 'x'.center(10 ** 9) }}", "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10 ** 9) }}",
        "{{ '{x}'.format_map({'x': 1}) }}",
        "{{ ('%s' | attr('center'))(10 ** 9) }}", "{{ ('{:9}' | attr('format'))(1) }}",
         "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception('roles must alternate') }}", "{{ missing.attribute }}", "{{ 1 / 0 }}",
        "{{ lipsum(n=1) }}",
    ],
)  # fmt: skip
def test_what_templates_cannot_do(source: str) -> None:
    template = ChatTemplate(source, {})
    with pytest.raises(Refused, match="the chat template refuses") as refusal:
        template.render(USER)
    assert refusal.value.code is ErrorCode.BAD_INPUT


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{ x | nothing }}", "{% include 'x' %", "{{", "{{ [1, 2] | random }}"]
)
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(Refused, match="chat template") as refusal:
        ChatTemplate(source, {})
    assert refusal.value.code is ErrorCode.BAD_MODEL


def test_broken_tokenizers_are_refused() -> None:
    rng, read, data = random.Random(8), 0, _small_tokenizer()
    assert Text({"tokenizer.json": data}).encode("the text") == [2, 3]
    for _ in range(10_000):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            Text({"tokenizer.json": bytes(broken)}).encode("the text")
        except Refused as refusal:
            assert refusal.code in (ErrorCode.BAD_MODEL, ErrorCode.BAD_INPUT)
        else:
            read += 1
    assert 0 < read < 10_000


def _small_tokenizer() -> bytes:
    special = {"id": 0, "content": "<unk>", "special": True, "single_word": False,
               "lstrip": False, "rstrip": False, "normalized": False}  # fmt: skip
    vocab = {"<unk>": 0, "a": 1, "the": 2, "text": 3}
    return json.dumps({
        "version": "1.0", "added_tokens": [special], "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    }).encode()  # fmt: skip
