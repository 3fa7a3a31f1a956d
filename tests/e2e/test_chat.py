"""Conversations in a terminal and on a pipe, with a swarm whose models say what they are to."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from blyan_node.testing.daemons import Testnet
from blyan_node.testing.scripted import THINKS_FIRST, make_scripted, make_thinker
from blyan_node.testing.terminal import CTRL_C, CTRL_D, Terminal

TEMPLATES = Path(__file__).parents[1] / "templates"
# What was said ends the prompt, so a question decides its answer.
LAST_WORD = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
SAYS = {
    "hello": "Paris", "Paris": "is", "is": "nice", "nice": "<end>",
    "count": "one", "one": "two", "two": "three", "three": "one",
    "bye": "good", "good": "night", "night": "<end>",
}  # fmt: skip


@pytest.fixture(scope="module")
def talkers(swarm: Testnet, tmp_path_factory: pytest.TempPathFactory) -> Testnet:
    """`plain` and `thinker`, every expert of which is held by two gpu nodes."""
    folder = tmp_path_factory.mktemp("models")
    plain = make_scripted(
        "mixtral", folder / "plain", ["user", "assistant", *SAYS], SAYS, template=LAST_WORD
    )
    harmony = (TEMPLATES / "gpt_oss.jinja").read_text()
    thinker = make_thinker(folder / "thinker", harmony)
    for path in (plain, thinker):
        swarm["alice"]("model", "publish", path, "--name", path.name, "--wait-replicas", 2)
    return swarm


def _counts(text: str) -> tuple[int, int]:
    """Tokens of the prompt and of the answer, as the last answer's statistics say."""
    found = re.findall(r"\[(\d+) \+ (\d+) tokens", text)
    return int(found[-1][0]), int(found[-1][1])


def test_a_conversation_in_a_terminal(talkers: Testnet) -> None:
    rpc = talkers["alice"].rpc
    with Terminal("--rpc", rpc, "chat", "--model", "plain", "--max-tokens", 50_000, "-v") as alice:
        alice.until("> ")
        alice.type("hello\n")
        alice.until("Paris is nice\n")
        prompt, made = _counts(alice.until("\n> "))
        assert (prompt, made) == (len(["user", "hello"]), 4)

        alice.type("count\n")  # it never ends by itself
        alice.until("one two three one two")
        alice.type(CTRL_C)
        shown = alice.until("[stopped]")
        prompt, made = _counts(shown)
        assert prompt == len(["user", "hello", "assistant", "Paris", "is", "nice", "user", "count"])
        alice.until("> ")

        alice.type("bye\n")  # answered with both turns in view, what was said of the second
        alice.until("good night\n")
        before = prompt
        prompt, _ = _counts(alice.until("\n> "))
        assert prompt == before + 1 + made + len(["user", "bye"])

        alice.type("/reset\n")
        alice.until("> ")
        alice.type("bye\n")
        alice.until("good night\n")
        assert _counts(alice.until("\n> "))[0] == 2
        alice.type(CTRL_C)
        assert alice.ends() == 0
        assert "Traceback" not in alice.shown
    assert talkers["alice"]("generate", "--model", "plain", "count", "--max-tokens", 2)["text"] == (
        "one two"
    )


def test_a_stop_string_ends_an_answer_that_never_ends(talkers: Testnet) -> None:
    rpc = talkers["alice"].rpc
    with Terminal("--rpc", rpc, "chat", "--model", "plain", "--stop", "three") as alice:
        alice.until("> ")
        alice.type("count\n")
        assert "three" not in alice.until("one two \n")
        alice.until("> ")
        alice.type(CTRL_D)
        assert alice.ends() == 0
    answer = talkers["alice"]("generate", "--model", "plain", "count", "--stop", "wo thr")
    assert (answer["text"], answer["finish"], len(answer["token_ids"])) == ("one t", "stop", 3)


def test_a_model_that_thinks(talkers: Testnet) -> None:
    rpc = talkers["alice"].rpc
    with Terminal(
        "--rpc", rpc, "chat", "--model", "thinker", "--seed", THINKS_FIRST, "-v"
    ) as alice:
        alice.until("> ")
        alice.type("hello\n")
        assert alice.until("Paris is nice\n").endswith("Hm so\nParis is nice\n")
        first, made = _counts(alice.until("\n> "))
        alice.type("hello\n")
        alice.until("nice\n")
        second, _ = _counts(alice.until("\n> "))
        turn = "<|start|> assistant <|channel|> final <|message|> Paris is nice <|end|>"
        assert (
            second
            == first + len(turn.split()) + len(["<|start|>", "user", "<|message|>", "hello"]) + 1
        )
        assert made > len(turn.split())  # what it thought is not in the history
        alice.type(CTRL_D)
        assert alice.ends() == 0
    answer = talkers["alice"](
        "generate", "--model", "thinker", "hello", "--chat", "--seed", THINKS_FIRST
    )
    assert (answer["text"], answer["reasoning"]) == ("Paris is nice", "Hm so")
    assert answer["sampling"]["top_k"] == 2


def test_a_model_is_told_how_long_to_think(talkers: Testnet) -> None:
    alice, high = talkers["alice"], ("hello", "--chat", "--reasoning-effort", "high")
    assert alice("generate", "--model", "thinker", *high, "--max-tokens", 1)["finish"] == "length"
    error = alice("generate", "--model", "plain", *high, code=1)["error"]
    assert "does not ask for it" in error["data"]["why"]


def test_the_seed_decides_wherever_the_experts_are(talkers: Testnet) -> None:
    """On a main node whose experts are elsewhere, and on one that computes some itself."""
    ask = (
        "generate", "--model", "thinker", "hello", "--max-tokens", 40, "--seed", 7,
        "--temperature", 3.0, "--top-k", 50, "--top-p", 0.99, "--min-p", 0.001,
        "--repetition-penalty", 1.2, "--ignore-eos",
    )  # fmt: skip
    there, here = talkers["alice"](*ask), talkers["bob"](*ask)
    assert here["token_ids"] == there["token_ids"]
    assert here["trace"] != there["trace"]
    assert len(set(there["token_ids"])) > 5


def test_a_conversation_on_a_pipe(talkers: Testnet) -> None:
    line = [sys.executable, "-m", "cli.main", "--rpc", talkers["alice"].rpc, "chat", "--json"]
    done = subprocess.run(
        [*line, "--model", "plain"], input=b"hello\nbye\n", capture_output=True, check=True
    )
    answers: list[dict[str, Any]] = [json.loads(one) for one in done.stdout.splitlines()]
    assert [one["text"] for one in answers] == ["Paris is nice", "good night"]
    assert [one["stats"]["prompt_tokens"] for one in answers] == [2, 8]
