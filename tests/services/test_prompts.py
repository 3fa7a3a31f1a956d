"""From a request to an answer's text: prompts, settings, stop strings and channels, by scripts."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from blyan_node.moe.sampling import GREEDY, Sampler, Sampling
from blyan_node.services.generation import Generation
from blyan_node.services.prompts import sampling
from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.reference import open_reference
from blyan_node.testing.scripted import THINKS_FIRST, make_scripted, make_thinker
from blyan_node.testing.swarm import Swarm
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import ErrorCode, Refused
from protocols.rpc.generate import GenerateRequest, GenerateResult, Message, SamplingUsed, Token

TEMPLATES = Path(__file__).parents[1] / "templates"
WORDS = ["[INST]", "[/INST]", "Paris", "is", "a", "nice", "city", "hello", "<s>"]
SAYS = {"[/INST]": "Paris", "Paris": "is", "is": "a", "a": "nice", "nice": "city", "city": "<end>"}


class Told:
    """Every token that was passed on."""

    def __init__(self) -> None:
        self.tokens: list[Token] = []

    def __call__(self, token: Token) -> None:
        self.tokens.append(token)

    @property
    def text(self) -> str:
        return "".join(token.text or "" for token in self.tokens)

    @property
    def reasoning(self) -> str:
        return "".join(token.reasoning or "" for token in self.tokens)


@asynccontextmanager
async def answering(path: Path, tmp_path: Path) -> AsyncIterator[Generation]:
    swarm = Swarm(tmp_path / "nodes")
    alice = swarm.node("alice", "main")
    async with swarm.started():
        await alice.publish(path, "m")
        yield alice.generation


async def answer(on: Generation, **fields: object) -> tuple[GenerateResult, Told]:
    told = Told()
    result = await on.generate(GenerateRequest(model="m", **fields), told)  # type: ignore[arg-type]
    assert [token.token_id for token in told.tokens] == result.token_ids
    assert told.text == result.text
    assert told.reasoning == (result.reasoning or "")
    return result, told


def user(content: str) -> Message:
    return Message(role="user", content=content)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = (TEMPLATES / "mixtral.jinja").read_text()
    return make_scripted(
        "mixtral", tmp_path_factory.mktemp("plain") / "m", WORDS, SAYS, template=template
    )


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Path:
    template = (TEMPLATES / "gpt_oss.jinja").read_text()
    return make_thinker(tmp_path_factory.mktemp("harmony") / "m", template)


@trio_test
async def test_prompts_chats_and_conversations(plain: Path, tmp_path: Path) -> None:
    async with answering(plain, tmp_path) as on:
        said, _ = await answer(on, prompt="hello", chat=True)
        assert (said.text, said.finish, said.reasoning) == ("Paris is a nice city", "stop", None)
        same, _ = await answer(on, messages=[user("hello")])
        assert same.token_ids == said.token_ids
        assert same.stats.prompt_tokens == said.stats.prompt_tokens
        turns = [user("hello"), Message(role="assistant", content="a city"), user("hello")]
        longer, _ = await answer(on, messages=turns)
        assert longer.stats.prompt_tokens > same.stats.prompt_tokens + 3
        with pytest.raises(Refused, match="take turns"):
            await answer(on, messages=[user("hello"), user("hello")])
        raw, _ = await answer(on, prompt="a", max_tokens=2)
        assert (raw.text, raw.finish) == ("nice city", "length")


@trio_test
async def test_stop_strings_end_the_text_and_not_the_tokens(plain: Path, tmp_path: Path) -> None:
    async with answering(plain, tmp_path) as on:
        whole, _ = await answer(on, prompt="[/INST]")
        said, told = await answer(on, prompt="[/INST]", stop=(" nice",))
        assert (said.text, said.finish) == ("Paris is a", "stop")
        assert said.token_ids == whole.token_ids[:4]
        said, told = await answer(on, prompt="[/INST]", stop=("s a n",), max_tokens=4)
        assert (said.text, said.finish) == ("Paris i", "stop")
        assert [token.text for token in told.tokens] == ["Pari", "s i", "", ""]
        said, told = await answer(on, prompt="[/INST]", stop=("city!", "x"))
        assert (said.text, said.finish) == ("Paris is a nice city", "stop")
        said, told = await answer(on, prompt="[/INST]", stop=("is b",), max_tokens=2)
        assert (said.text, said.finish) == ("Paris is", "length")


@trio_test
async def test_what_was_used_is_told(plain: Path, tmp_path: Path) -> None:
    async with answering(plain, tmp_path) as on:
        greedy, _ = await answer(on, prompt="hello")
        assert greedy.sampling == SamplingUsed(
            temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=None
        )
        hot, _ = await answer(on, prompt="hello", temperature=5.0, min_p=0.5, max_tokens=40)
        assert (hot.sampling.temperature, hot.sampling.min_p) == (5.0, 0.5)
        again, _ = await answer(
            on, prompt="hello", temperature=5.0, min_p=0.5, max_tokens=40, seed=hot.sampling.seed
        )
        assert again.token_ids == hot.token_ids


@trio_test
async def test_every_setting_reaches_the_sampler(tmp_path: Path) -> None:
    path = make_checkpoint("mixtral", tmp_path / "hot")
    prompt = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43]
    settings: dict[str, Any] = {
        "temperature": 1.3, "top_k": 40, "top_p": 0.95, "min_p": 0.2, "repetition_penalty": 1.8
    }  # fmt: skip
    truth = open_reference(path)

    def expected(**others: Any) -> list[int]:
        return truth.generate(prompt, 16, Sampler(Sampling(**settings | others), 7))

    async with answering(path, tmp_path) as on:
        request = GenerateRequest(
            model="m", prompt_ids=prompt, max_tokens=16, ignore_eos=True, seed=7, **settings
        )
        result = await on.generate(request, Told())
    assert result.token_ids == expected()
    neutral = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    shown = {name for name, value in neutral.items() if expected(**{name: value}) != expected()}
    assert shown == set(neutral)


def test_what_a_request_says_wins() -> None:
    model = Sampling(0.6, 20, 0.95, 0.0, 1.05)

    def used(**fields: object) -> Sampling:
        return sampling(GenerateRequest(model="m", prompt="p", **fields), model)  # type: ignore[arg-type]

    assert used() == model
    assert used(temperature=0) == Sampling(0, 20, 0.95, 0.0, 1.05)
    assert used(top_k=0, min_p=0.1, repetition_penalty=1.0) == Sampling(0.6, 0, 0.95, 0.1, 1.0)
    assert sampling(GenerateRequest(model="m", prompt="p"), GREEDY) == GREEDY


@trio_test
async def test_the_models_own_settings_are_the_default(harmony: Path, tmp_path: Path) -> None:
    async with answering(harmony, tmp_path) as on:
        own, _ = await answer(on, prompt="hello", max_tokens=1)
        assert own.sampling.temperature == 1.0
        assert own.sampling.seed is not None
        cold, _ = await answer(on, prompt="hello", max_tokens=1, temperature=0)
        assert (cold.sampling.temperature, cold.sampling.seed) == (0.0, None)


@trio_test
async def test_what_the_model_thinks_is_told_apart(harmony: Path, tmp_path: Path) -> None:
    async with answering(harmony, tmp_path) as on:
        said, _ = await answer(on, messages=[user("hello")], seed=THINKS_FIRST)
        assert (said.text, said.reasoning, said.finish) == ("Paris is nice", "Hm so", "stop")
        raw, _ = await answer(on, prompt_ids=[1], seed=THINKS_FIRST, max_tokens=1)
        assert raw.reasoning is None
        asked, _ = await answer(on, prompt="hello", chat=True, seed=THINKS_FIRST)
        assert asked.token_ids == said.token_ids
        cut, _ = await answer(
            on, prompt="hello", chat=True, seed=THINKS_FIRST, stop=("so", " nice")
        )
        assert (cut.text, cut.reasoning, cut.finish) == ("Paris is", "Hm so", "stop")
        thought, _ = await answer(on, prompt="hello", chat=True, seed=THINKS_FIRST, max_tokens=5)
        assert (thought.text, thought.reasoning, thought.finish) == ("", "Hm so", "length")


@trio_test
async def test_several_messages_of_a_channel_are_lines_apart(harmony: Path, tmp_path: Path) -> None:
    async with answering(harmony, tmp_path) as on:
        seen = set()
        for seed in range(40):
            said, _ = await answer(on, prompt="hello", chat=True, seed=seed)
            seen.add(said.reasoning)
        assert "Hm so\nHm so" in seen


@trio_test
async def test_a_model_without_a_tokenizer_has_no_text_to_stop_at(
    plain: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in plain.iterdir():
        if "token" not in file.name and file.suffix != ".jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    async with answering(bare, tmp_path) as on:
        with pytest.raises(Refused, match="token ids only") as refused:
            await on.generate(GenerateRequest(model="m", prompt_ids=[1], stop=("x",)), Told())
        assert refused.value.code is ErrorCode.BAD_INPUT
        with pytest.raises(Refused, match="token ids only"):
            await on.generate(GenerateRequest(model="m", messages=[user("x")]), Told())
