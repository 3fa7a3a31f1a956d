"""A server with scripted answers behind a real socket, and the command run against it."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from blyan_node.rpc import calls
from blyan_node.rpc.connection import Bound
from blyan_node.rpc.context import Context
from blyan_node.rpc.server import RpcServer
from cli.main import run
from protocols.rpc.table import METHODS


@dataclass
class Said:
    """What one run of the command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@dataclass
class Scripted:
    """A node that answers as the test says, and remembers what it was asked."""

    path: Path
    answers: dict[str, Callable[[Any, Context], Any]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def handlers(self) -> dict[str, Bound]:
        def bound(name: str) -> Bound:
            async def handle(request: Any, context: Context) -> Any:
                self.asked.append((name, request))
                answer = self.answers[name](request, context)
                return await answer if hasattr(answer, "__await__") else answer

            return handle

        async def cancel(request: Any, context: Context) -> object:
            return await calls.cancel(None, request, context)

        return {name: bound(name) for name in METHODS} | {"rpc.cancel": cancel}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Scripted]:
    """A scripted node that listens on its socket until the test ends."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    scripted = Scripted(home / "rpc.sock")
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(RpcServer(scripted.path, scripted.handlers()).run)
            token = trio.lowlevel.current_trio_token()
            stop.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
            ready.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    ready.wait(30)
    yield scripted
    stop[0]()
    thread.join(30)


@pytest.fixture
def command(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Said]:
    """Runs the command in this process, with a home of the test's own."""
    monkeypatch.delenv("BLYAN_RPC", raising=False)
    monkeypatch.setenv("BLYAN_HOME", str(tmp_path / "home"))

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Said(code, out, err)

    return call
