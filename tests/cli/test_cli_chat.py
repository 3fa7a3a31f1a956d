"""`chat` in a terminal and on a pipe: what it asks, keeps, forgets and shows."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.testing.terminal import CTRL_C, CTRL_D, Terminal
from protocols.errors import ErrorCode, Refused
from protocols.rpc.generate import (
    GenerateRequest,
    GenerateResult,
    GenerateStats,
    SamplingUsed,
    Token,
)
from protocols.rpc.model import ShowResult

SHOWN = ShowResult(
    name="m", model="bafk", author="12D3", family="gpt_oss", root="r", experts=1, held=1, bytes=1,
    subjects={},
)  # fmt: skip


def said(
    text: str, finish: str = "stop", reasoning: str | None = None, tokens: int = 2
) -> GenerateResult:
    return GenerateResult(
        token_ids=[1],
        text=text,
        root="ab" * 32,
        finish=finish,  # type: ignore[arg-type]
        sampling=SamplingUsed(
            temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=None
        ),
        trace={},
        stats=GenerateStats(
            prompt_tokens=3, new_tokens=tokens, prefill_s=0.1, decode_s=0.2, tokens_per_s=10.0,
            max_gap_s=0.1, remote_calls=4, bytes_sent=1, bytes_received=2, retries=0,
            fetched_bytes=0,
        ),
        profile="cpu-sums3-published",
        reasoning=reasoning,
    )  # fmt: skip


class Model:
    """Answers `echo N: LINE`, or what a line asks for; remembers every conversation."""

    def __init__(self, node: Any) -> None:
        self.heard: list[GenerateRequest] = []
        self.writing = threading.Event()
        node.answers["model.show"] = lambda request, context: SHOWN
        node.answers["generate.run"] = self.answer

    async def answer(self, request: GenerateRequest, context: Any) -> GenerateResult:
        self.heard.append(request)
        assert request.messages is not None
        line = request.messages[-1].content
        if line == "refuse":
            raise Refused(ErrorCode.EXPERT_UNAVAILABLE, "no expert", "nobody holds it", "wait")
        if line == "wait":
            ended = trio.Event()
            context.on_cancel(ended.set)
            context.notify(Token(token_id=1, text="half an"))
            self.writing.set()
            await ended.wait()
            return said("half an", "cancelled")
        if line == "load":
            self.writing.set()
            await trio.sleep_forever()
        if line == "nothing":
            return said("")
        text = f"echo {len(self.heard)}: {line}"
        if line == "think":
            context.notify(Token(token_id=1, text="", reasoning="let me see"))
        for piece in (text[:4], text[4:]):
            context.notify(Token(token_id=1, text=piece))
        cut = {"long": 1024, "full": 7}.get(line)
        return said(text) if cut is None else said(text, "length", tokens=cut)

    @property
    def last(self) -> list[tuple[str, str]]:
        """What the model was told last."""
        assert self.heard[-1].messages is not None
        return [(message.role, message.content) for message in self.heard[-1].messages]


@pytest.fixture
def model(node: Any) -> Model:
    return Model(node)


@pytest.fixture
def piped(node: Any) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(text: str | bytes, *options: object) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "cli.main", "--rpc", str(node.path), "chat", "--model", "m"]
        done = subprocess.run(
            [*line, *map(str, options)],
            input=text if isinstance(text, bytes) else text.encode(),
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert b"Traceback" not in done.stderr
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    return run


# On a pipe -----------------------------------------------------------------------------------


def test_every_line_is_answered_with_all_that_was_said(model: Model, piped: Any) -> None:
    done = piped("hello\n\nagain\n", "--system", "Be brief.", "--temperature", 0.5, "--stop", "x")
    assert done.returncode == 0
    assert done.stdout == "echo 1: hello\necho 2: again\n"
    assert done.stderr == ""
    assert model.last == [
        ("system", "Be brief."),
        ("user", "hello"),
        ("assistant", "echo 1: hello"),
        ("user", "again"),
    ]
    request = model.heard[-1]
    assert (request.temperature, request.stop, request.top_k) == (0.5, ("x",), None)
    assert request.max_tokens == 1024


def test_json_is_a_document_for_each_turn(model: Model, piped: Any) -> None:
    done = piped("hello\nrefuse\n/nonsense\nlast", "--json", "--max-tokens", 7)
    first, refused, last = map(json.loads, done.stdout.splitlines())
    assert (first["text"], last["text"]) == ("echo 1: hello", "echo 3: last")
    assert refused["error"]["code"] == ErrorCode.EXPERT_UNAVAILABLE
    assert done.returncode == 1
    assert model.heard[-1].max_tokens == 7


def test_an_error_is_shown_and_its_question_forgotten(model: Model, piped: Any) -> None:
    done = piped("refuse\nnothing\nhello\n")
    assert done.returncode == 1
    assert done.stdout == "echo 3: hello\n"
    assert "error: no expert" in done.stderr
    assert "nothing was said" in done.stderr
    assert model.last == [("user", "hello")]


def test_commands_and_lines_that_only_look_like_them(model: Model, piped: Any) -> None:
    done = piped("one\n/reset\n/what is this\n /etc/passwd\n/help\n/quit\nnever\n")
    assert model.last == [("user", "/etc/passwd")]
    assert "there is no /what" in done.stderr
    assert "/reset   forget" in done.stderr
    assert done.returncode == 0


def test_thoughts_are_on_stderr_and_not_in_the_history(model: Model, piped: Any) -> None:
    done = piped("think\nlong\nfull\n")
    assert done.stdout == "echo 1: think\necho 2: long\necho 3: full\n"
    assert "let me see\n" in done.stderr
    assert "cut at 1024 tokens; --max-tokens allows more" in done.stderr
    assert "cut at 7 tokens: the model reads no more; /reset begins anew" in done.stderr
    assert "let me see" not in str(model.last)


def test_text_that_is_no_text_is_taken_as_it_can_be(model: Model, piped: Any) -> None:
    assert piped(b"\xff\xfe hi\x00\n").returncode == 0
    assert model.last == [("user", "\ufffd\ufffd hi\x00")]


def test_a_wrong_model_or_option_ends_at_once(node: Any, model: Model, piped: Any) -> None:
    def unknown(request: Any, context: Any) -> None:
        raise Refused(ErrorCode.NOT_FOUND, "there is no model m", "")

    assert piped("hello\n", "--top-p", 3).returncode == 3
    node.answers["model.show"] = unknown
    done = piped("hello\n")
    assert done.returncode == 1
    assert "there is no model m" in done.stderr
    assert not model.heard


def test_without_a_node_it_is_exit_2(tmp_path: Path, command: Any) -> None:
    assert command("chat", "--model", "m", "--rpc", tmp_path / "none").code == 2


# In a terminal -------------------------------------------------------------------------------


def talk(node: Any, *options: object) -> Terminal:
    return Terminal("--rpc", node.path, "chat", "--model", "m", *options)


def test_ctrl_c_ends_the_answer_and_the_next_one_leaves(node: Any, model: Model) -> None:
    with talk(node) as terminal:
        terminal.until("> ")
        terminal.type("wait\n")
        terminal.until("half an")
        terminal.type(CTRL_C)
        terminal.until("[stopped]")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("echo 2: hello\n")
        assert model.last[:2] == [("user", "wait"), ("assistant", "half an")]
        terminal.until("> ")
        terminal.type(CTRL_C)
        assert terminal.ends() == 0
        assert "Traceback" not in terminal.shown


def test_ctrl_c_before_an_answer_begins_forgets_the_question(node: Any, model: Model) -> None:
    with talk(node) as terminal:
        terminal.until("> ")
        terminal.type("load\n")
        assert model.writing.wait(30)
        terminal.type(CTRL_C)
        terminal.until("stopped before it began")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("echo 2: hello")
        assert model.last == [("user", "hello")]
        terminal.until("> ")
        terminal.type(CTRL_D)
        assert terminal.ends() == 0


def test_ctrl_c_takes_a_half_written_line_back(node: Any, model: Model) -> None:
    with talk(node) as terminal:
        terminal.until("> ")
        terminal.type("hel")
        terminal.until("hel")
        terminal.type(CTRL_C)
        terminal.until("> ")
        terminal.type("x\n")
        terminal.until("echo 1: x\n")
        terminal.until("> ")
        terminal.type(CTRL_D)
        assert terminal.ends() == 0


def test_lines_can_be_edited_and_had_again(node: Any, model: Model) -> None:
    pytest.importorskip("readline")
    with talk(node) as terminal:
        terminal.until("> ")
        terminal.type("abd\x7fc\n")
        terminal.until("echo 1: abc\n")
        terminal.until("> ")
        terminal.type("\x10\n")  # Ctrl-P: the line before
        terminal.until("echo 2: abc\n")
        terminal.until("> ")
        terminal.type("/help\n")
        terminal.until("/quit    leave")
        terminal.until("> ")
        terminal.type("/reset\n")
        terminal.until("forgotten]")
        terminal.until("> ")
        terminal.type("new\n")
        terminal.until("echo 3: new\n")
        assert model.last == [("user", "new")]
        terminal.until("> ")
        terminal.type("/quit\n")
        assert terminal.ends() == 0


def test_errors_are_shown_without_leaving_even_if_the_node_is_gone(node: Any, model: Model) -> None:
    with talk(node) as terminal:
        terminal.until("> ")
        terminal.type("refuse\n")
        terminal.until("error: no expert")
        terminal.until("> ")
        away = node.path.with_name("away")
        os.rename(node.path, away)
        terminal.type("hello\n")
        terminal.until("no node answers")
        terminal.until("> ")
        os.rename(away, node.path)
        terminal.type("hello\n")
        terminal.until("echo 2: hello\n")
        assert model.last == [("user", "hello")]
        terminal.until("> ")
        terminal.type(CTRL_D)
        assert terminal.ends() == 0


def test_a_model_cannot_drive_the_terminal(node: Any, model: Model) -> None:
    with talk(node) as terminal:
        terminal.until("> ")
        terminal.type("a \x16\x1b[2J \x16\x07b\n")  # Ctrl-V takes the next key as it is
        terminal.until("echo 1: a [2J b\n")
        terminal.until("> ")
        terminal.type(CTRL_D)
        terminal.ends()
    assert "\x1b[2J" in model.last[-1][1]
    assert b"echo 1: a [2J b" in terminal._raw.replace(b"\r", b"")
