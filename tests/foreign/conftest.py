"""A js-libp2p peer as a process, a network of two daemons that it talks to, and their model."""

import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from blyan_node.bench.models import write_model
from blyan_node.testing.daemons import Testnet
from protocols.tensors.manifest import Dtype

HERE = Path(__file__).parent
PATIENCE_S = 60
SMALL: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip

Line = dict[str, Any]


class Foreign:
    """One js-libp2p peer; a `with` block that ends it and prints the log of its exchanges.

    `only` are the ids of the peers that it has connections with, if not all that it finds.
    """

    def __init__(self, name: str, only: Sequence[str] | None = None) -> None:
        self.name = name
        self.log: list[Line] = []
        self._came = threading.Condition()
        self._ended = False
        self._asked = 0
        self._process = subprocess.Popen(
            ["node", "peer.mjs"], cwd=HERE, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        self.begin(only)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        assert self._process.stderr is not None
        self._process.kill()
        self._reading.join()
        print(f"--- {self.name} {self.peer_id}")
        print("\n".join(json.dumps(line)[:400] for line in self.log))
        print(self._process.stderr.read()[-2000:])
        with self._process:  # closes the pipes and waits
            pass

    def begin(self, only: Sequence[str] | None = None) -> None:
        """Becomes another peer, with another key."""
        started = self.call("start", only=only)
        self.peer_id: str = started["peer"]
        self.addr: str = started["addrs"][0]

    def call(self, do: str, **parameters: object) -> Line:
        """Does one thing; fails if the peer could not."""
        reply = self.tries(do, **parameters)
        assert "error" not in reply, (do, reply)
        return reply

    def tries(self, do: str, **parameters: object) -> Line:
        """Does one thing, which may go wrong: `error` says how."""
        assert self._process.stdin is not None
        self._asked += 1
        command = {"do": do, "id": self._asked, **parameters}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        number = self._asked
        return self.until(lambda line: line.get("reply") == number, f"a reply to {do}")

    def until(self, holds: Callable[[Line], bool], what: str) -> Line:
        """The first line of the log for which it holds, if need be one that is yet to come."""

        def found() -> Line | None:
            return next((line for line in self.log if holds(line)), None)

        with self._came:
            self._came.wait_for(lambda: found() is not None or self._ended, PATIENCE_S)
            line = found()
        assert line is not None, f"{self.name}: no {what}; {self.log[-20:]}"
        return line

    def event(self, kind: str, **fields: object) -> Line:
        """Waits for an event with these fields."""
        wanted = {"event": kind, **fields}
        return self.until(lambda line: wanted.items() <= line.items(), f"{wanted}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            with self._came:
                self.log.append(json.loads(text))
                self._came.notify_all()
        with self._came:
            self._ended = True
            self._came.notify_all()


@pytest.fixture(scope="session")
def installed() -> None:
    """Skips where js-libp2p is not here."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (HERE / "node_modules" / "libp2p").is_dir():
        pytest.skip("js-libp2p is not installed; `make foreign` installs it")


@pytest.fixture
def foreign(installed: None) -> Iterator[Callable[..., Foreign]]:
    """Makes peers of js-libp2p, which end with the test."""
    with ExitStack() as peers:
        yield lambda *given: peers.enter_context(Foreign(*given))


@pytest.fixture(scope="module")
def pair(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testnet]:
    """Alice, who has published a model, and bob, who holds its experts."""
    net = Testnet(tmp_path_factory.mktemp("net"))
    net.run("up", "--nodes", 2)
    try:
        model = write_model(tmp_path_factory.mktemp("model") / "m", Dtype.F32, **SMALL)
        net["alice"]("model", "publish", model, "--name", "small", "--wait-replicas", 1)
        yield net
    finally:
        net.run("down")
