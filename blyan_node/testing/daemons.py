"""Real daemons, driven as an operator drives them: by the `blyan-node` command and its JSON."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COMMAND_S = 180


class CommandFailed(AssertionError):
    """The command ended with another exit code than the test expects."""


def blyan(*arguments: object, code: int = 0, timeout_s: float = COMMAND_S) -> Any:
    """Runs `blyan-node … --json` and returns its document; an exit code other than `code` fails."""
    # In a session of its own: Ctrl-C is for us, and what we have started is ended in order.
    child = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *map(str, arguments), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with child:
        try:
            out, err = child.communicate(timeout=timeout_s)
        except BaseException:  # Ctrl-C, or it takes too long: a `testnet up` ends its daemons
            child.terminate()
            child.communicate()
            raise
    if child.returncode != code:
        raise CommandFailed(
            f"blyan-node {' '.join(map(str, arguments))}: exit {child.returncode}, not {code}\n"
            f"{out[-2000:]}\n{err[-4000:]}"
        )
    assert "Traceback" not in err, err
    return json.loads(out) if out.strip() else None


@dataclass
class Node:
    """One daemon of a testnet, and what a test asks of it."""

    name: str
    home: Path
    rpc: str
    peer_id: str
    addrs: list[str]
    pid: int | None
    role: str

    def __call__(self, *arguments: object, code: int = 0, timeout_s: float = COMMAND_S) -> Any:
        """Runs a command against this node."""
        return blyan("--rpc", self.rpc, *arguments, code=code, timeout_s=timeout_s)

    def call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        """One RPC call over the socket, without the command."""
        with self.stream(method, params or {}) as lines:
            for line in lines:
                if line.get("id") == 1:
                    if "error" in line:
                        raise CommandFailed(f"{method}: {line['error']}")
                    return line["result"]
        raise CommandFailed(f"{method}: {self.name} closed the connection")

    @contextmanager
    def stream(self, method: str, params: dict[str, Any]) -> Iterator[Iterator[dict[str, Any]]]:
        """Sends one request (id 1) and yields every line that comes back, parsed."""
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(COMMAND_S)
            link.connect(self.rpc)
            request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            link.sendall(json.dumps(request).encode() + b"\n")
            with link.makefile("rb") as file:
                yield (json.loads(line) for line in file)

    def until(self, what: str, holds: Callable[[], Any]) -> Any:
        """Waits until `holds()` is true, looking again after each of the node's events."""
        with self.stream("events.subscribe", {}) as events:
            if value := holds():
                return value
            for _ in events:
                if value := holds():
                    return value
        raise CommandFailed(f"{self.name}: {what} did not come about")


@dataclass
class Testnet:
    """A directory with a testnet, and its nodes by name."""

    __test__ = False

    dir: Path
    nodes: dict[str, Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def run(self, verb: str, *arguments: object) -> Any:
        """Runs `testnet VERB` on this directory and takes over what it says of the nodes."""
        document = blyan("testnet", verb, *arguments, "--dir", self.dir)
        if document and "nodes" in document:
            for node in document["nodes"]:
                known = {key: node[key] for key in ("name", "rpc", "peer_id", "addrs", "role")}
                self.nodes[node["name"]] = Node(home=Path(node["home"]), pid=node["pid"], **known)
        return document

    def refresh(self) -> "Testnet":
        """Asks again for pids and states."""
        self.run("status")
        return self

    def logs(self) -> str:
        """The ends of all logs, for a failing test to show."""
        return "\n".join(
            f"--- {path}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.dir.glob("*.log"))
        )


def alive(pid: int) -> bool:
    """Whether a process runs under this id; one that has ended and is not reaped yet does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def kill(pid: int) -> None:
    """SIGKILL for a process that the test started."""
    os.kill(pid, signal.SIGKILL)
