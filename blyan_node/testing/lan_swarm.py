"""A swarm of real daemons on machines of their own, for what happens to links between them.

Alice is main and the bootstrap node; the others are gpu nodes that hold every expert of a model
that alice has published. The RPC sockets are in the homes, which the host sees.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from blyan_node.home import create_home
from blyan_node.testing.daemons import Node
from blyan_node.testing.namespaces import Lan, Machine, lan
from protocols.dag.genesis import Genesis

COMES_ABOUT_S_MAX = 120
POLL_S = 0.1
PROMPT = (3, 17, 42, 5, 9, 23, 31, 8)
TOKENS = 12


@dataclass
class LanSwarm:
    """The machines and what runs on them."""

    net: Lan
    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)
    _bootstrap: tuple[str, ...] = ()

    def start(
        self,
        name: str,
        role: str,
        *options: str,
        dial_in: bool = True,
        behind: str | None = None,
    ) -> Node:
        """Starts a daemon on a machine of its own, `behind` a router; waits until it answers."""
        home = self.folder / name
        genesis = self.folder / "network.json"
        made = create_home(home, role="main" if role == "main" else "gpu", network=genesis)
        words = ["start", "--home", str(home), "--threads", "1", "--device", "cpu"]
        words += [*self._bootstrap, *options]
        machine = self.net.start(
            name,
            [sys.executable, "-m", "cli.main", *words],
            environment={**os.environ},
            log=self.folder / f"{name}.log",
            behind=behind,
        )
        if not dial_in:
            self.net.worsen(name, dial_in=False)
        if not self._bootstrap:
            self._bootstrap = (
                "--bootstrap",
                f"/ip4/{machine.address}/tcp/4040/p2p/{made['peer_id']}",
            )
        node = Node(name, home, str(home / "rpc.sock"), made["peer_id"], [], None, role)
        self.nodes[name] = node
        self.until("running", lambda: _runs(node))
        return node

    def peers(self, name: str) -> set[str]:
        """The names of a node's peers."""
        names = {node.peer_id: node.name for node in self.nodes.values()}
        found = self.nodes[name].call("node.peers")["peers"]
        return {names[peer["peer_id"]] for peer in found}

    def until(self, what: str, holds: Callable[[], bool]) -> float:
        """Looks again and again, as a node tells no event of its peers; how many s it took."""
        began = time.monotonic()
        while not holds():
            for name, machine in self.net.machines.items():
                assert machine.process.poll() is None, self.log(name)
            if time.monotonic() - began > COMES_ABOUT_S_MAX:
                logs = "\n".join(f"--- {name}\n{self.log(name)}" for name in self.nodes)
                raise AssertionError(f"not {what}:\n{logs}")
            time.sleep(POLL_S)
        return time.monotonic() - began

    def publish(self, model: Path, holders: Sequence[str]) -> None:
        """Alice publishes `model`; returns when each of `holders` advertises all of its experts."""
        alice = self.nodes["alice"]
        alice("model", "publish", model, "--name", "tiny", "--wait-replicas", len(holders))

    def answer(self) -> tuple[list[int], set[str]]:
        """One greedy answer of alice's: its tokens, and the names of those who computed for it."""
        request = {
            "model": "tiny",
            "prompt_ids": [*PROMPT],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        result = self.nodes["alice"].call("generate.run", request)
        names = {node.peer_id: node.name for node in self.nodes.values()}
        computed = {names[p] for expert in result["trace"].values() for p in expert["peers"]}
        return result["token_ids"], computed

    def move(self, name: str, address: str) -> None:
        """Gives a machine another address, as a router does after a reconnect."""
        machine: Machine = self.net.machines[name]
        machine.run("ip", "address", "flush", "dev", "eth0")
        machine.run("ip", "address", "add", f"{address}/24", "dev", "eth0")

    def log(self, name: str) -> str:
        """The end of a daemon's log."""
        return (self.folder / f"{name}.log").read_text()[-3000:]


@contextmanager
def lan_swarm(subnet: str, folder: Path) -> Iterator[LanSwarm]:
    """A network of its own, without nodes yet; raises `NamespaceFailed` where none can be."""
    (folder / "network.json").write_text(Genesis("lan", os.urandom(16), {}).to_json())
    with lan(subnet) as net:
        yield LanSwarm(net, folder)


def _runs(node: Node) -> bool:
    try:
        node.call("node.id")
    except OSError:
        return False
    return True
