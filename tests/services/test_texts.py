"""Tokenizers and templates of strangers: what they may cost, and that others do not pay for it."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.moe.checkpoint import Checkpoint
from blyan_node.moe.families import parse_config
from blyan_node.moe.text import Text
from blyan_node.services import texts
from blyan_node.services.models import Description
from blyan_node.services.texts import TextProcess, Texts
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.trio_tests import trio_test
from protocols import limits
from protocols.errors import ErrorCode, Refused
from protocols.ids import BlockId

USER = [{"role": "user", "content": "hi"}]
WIDENED = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path: Path = make_checkpoint("mixtral", tmp_path_factory.mktemp("m") / "m", tokenizer=True)
    return dict(Checkpoint.open(path).files)


@asynccontextmanager
async def opened(
    files: Mapping[str, bytes], model: bytes = b"m"
) -> AsyncIterator[tuple[Texts, TextProcess]]:
    async with trio.open_nursery() as nursery:
        known = Texts()
        await nursery.start(known.run)
        async with known.use(described(files, model)) as text:
            assert text is not None
            yield known, text
        nursery.cancel_scope.cancel()


def described(files: Mapping[str, bytes], model: bytes = b"m") -> Description:
    config = parse_config(files["config.json"])
    return Description(BlockId(model), "tiny", config, files, frozenset())


def changed(files: Mapping[str, bytes], **parts: Any) -> dict[str, bytes]:
    return {**files, "tokenizer.json": json.dumps(
        json.loads(files["tokenizer.json"]) | parts).encode()}  # fmt: skip


def templated(files: Mapping[str, bytes], source: str) -> dict[str, bytes]:
    return {**files, "chat_template.jinja": source.encode()}


@trio_test
async def test_it_says_what_the_library_says(files: dict[str, bytes]) -> None:
    here, prompt = Text(files), "größe 日本 🎉!"
    async with opened(files) as (_, text):
        ids = await text.encode(prompt)
        assert ids == here.encode(prompt)
        assert await text.chat(USER) == here.chat(USER)
        assert await text.decode(ids, [], ids[:3]) == [prompt, "", here.decode(ids[:3])]
        stream = text.stream()
        pieces = [await stream.add(token) for token in ids]
        assert "".join([*pieces, await stream.finish()]) == prompt


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='aaaa') %}{% for i in range(9) %}"
        "{% set n.x = n.x | replace('a', n.x) %}{% endfor %}",
        "{% set n = namespace(x=['aaaa']) %}{% for i in range(60) %}"
        "{% set n.x = [n.x | join(n.x | join), n.x | join] %}{% endfor %}",
        "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
    ],
)
@trio_test
async def test_a_template_cannot_fill_the_memory(files: dict[str, bytes], source: str) -> None:
    async with opened(templated(files, source)) as (_, text):
        with pytest.raises(Refused, match="template"):
            await text.chat(USER)
        assert await text.encode("hi")  # for others nothing has changed


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [WIDENED] * 4}},
        {"decoder": {"type": "Sequence", "decoders": [WIDENED] * 4}},
    ],
)
@trio_test
async def test_a_tokenizer_cannot_fill_the_memory(
    files: dict[str, bytes], part: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (a,) = Text(files).encode("a")
    async with opened(changed(files, **part)) as (_, text):
        monkeypatch.setattr(limits, "text_s_max", 5)  # or it has no time to
        with pytest.raises(Refused, match="it takes") as refused:
            await text.encode("a")
            await text.decode([a])
        monkeypatch.undo()
        assert refused.value.code is ErrorCode.BAD_MODEL
        assert await text.encode("b")  # in a process that was started again


@trio_test
async def test_a_request_that_takes_too_long_is_given_up(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(files) as (_, text):
        monkeypatch.setattr(limits, "text_s_max", 0)
        with pytest.raises(Refused, match="longer than"):
            await text.encode("hi")
        monkeypatch.undo()
        assert await text.encode("hi")


@trio_test
async def test_what_cannot_be_read_is_refused_at_first_use(files: dict[str, bytes]) -> None:
    async with trio.open_nursery() as nursery:
        known = Texts()
        await nursery.start(known.run)
        broken = described({**files, "tokenizer.json": b"{}"})
        for _ in range(2):
            with pytest.raises(Refused, match="tokenizer") as refused:
                async with known.use(broken):
                    raise AssertionError
            assert refused.value.code is ErrorCode.BAD_MODEL
        async with known.use(described({"config.json": files["config.json"]})) as text:
            assert text is None
        nursery.cancel_scope.cancel()


@trio_test
async def test_a_few_processes_stay_and_none_stays_at_the_end(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "idle_texts_max", 1)
    async with opened(files, b"one") as (known, one):
        process = one._process
        assert process is not None
        async with known.use(described(files, b"two")) as two, known.use(described(files)) as again:
            assert two is not None and again is not None
        assert two._process is None and again._process is not None
        async with known.use(described(files, b"one")) as same:
            assert same is one and one._process is process
    assert process.poll() is not None and again._process is None
