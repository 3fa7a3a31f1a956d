"""The compose testnet without an engine: each service's command as a process in namespaces.

A service gets what the compose file and the Dockerfile say: its name, an address and the others'
names, its environment, its mounts at their paths, no capability, a file system that it cannot write
to; and it starts when what it depends on is there. Its program is this environment's, not that of
an image, and memory is not limited.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.compose import Service, in_order, read_compose, read_dockerfile, the
from blyan_node.testing.daemons import Node
from blyan_node.testing.namespaces import Lan, Machine, Mount, lan, unavailable
from blyan_node.testing.truth import greedy

HOUSE = Path(__file__).parents[2]
STEPS = read_dockerfile(HOUSE / "Dockerfile")
NODES = ("bootstrap", "alice", "bob", "carol", "dave")
WORKERS = ("bob", "carol", "dave")
PROMPT = [3, 17, 42, 5, 9, 23, 31, 8]
NEW = 12
COMES_ABOUT_S_MAX = 120
POLL_S = 0.2


@dataclass
class Swarm:
    """The services that run, and where the host finds their homes."""

    net: Lan
    services: dict[str, Service]
    folder: Path

    def up(self) -> None:
        """What `docker compose up` does, in its order."""
        for name in in_order(self.services):
            for other, on in self.services[name].depends_on.items():
                if on.condition == "service_healthy":
                    self.healthy(other)
                else:
                    assert self.net.machines[other].process.wait(60) == 0, self.log(other)
            self.start(name)
        for name in NODES:
            self.healthy(name)

    def start(self, name: str) -> Machine:
        service = self.services[name]
        entry = service.entrypoint or the(STEPS, "node", "ENTRYPOINT").words
        command = service.command or the(STEPS, "node", "CMD").words
        return self.net.start(
            name,
            [*_confined(service), *entry, *command],
            environment=_environment(),
            mounts={m.target: Mount(self._source(m.source), m.read_only) for m in service.volumes},
            read_only=service.read_only,
            log=self.folder / f"{name}.log",
        )

    def healthy(self, name: str) -> None:
        """Waits until the image's health check succeeds."""
        check = the(STEPS, "node", "HEALTHCHECK").rest.partition("CMD ")[2]
        line = self.net.machines[name].enter("sh", "-c", check)

        def holds() -> bool:
            done = subprocess.run(line, capture_output=True, check=False, env=_environment())
            return done.returncode == 0

        self.until(name, "healthy", holds)

    def until(self, name: str, what: str, holds: Callable[[], bool]) -> None:
        """Looks again and again, as the engine does; the node tells no event of its peers."""
        deadline = time.monotonic() + COMES_ABOUT_S_MAX
        while not holds():
            assert self.net.machines[name].process.poll() is None, self.log(name)
            assert time.monotonic() < deadline, f"{name} is not {what}: {self.log(name)}"
            time.sleep(POLL_S)

    def node(self, name: str) -> Node:
        """A node as the host sees it: through the RPC socket in its home."""
        home = self.folder / "homes" / name
        rpc = home / "rpc.sock"
        about = Node(name, home, str(rpc), "", [], None, "").call("node.status")
        return Node(name, home, str(rpc), about["peer_id"], about["addrs"], None, about["role"])

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-3000:]

    def _source(self, source: str) -> Path:
        return Path(source) if source.startswith("/") else HOUSE / source


def _confined(service: Service) -> list[str]:
    """What the engine makes of `cap_drop` and `security_opt`."""
    assert service.cap_drop == ["ALL"] and service.security_opt == ["no-new-privileges:true"]
    return ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


def _environment() -> dict[str, str]:
    """The image's, with our programs in the place of the image's."""
    pairs = [word.partition("=") for word in the(STEPS, "node", "ENV").words]
    image = {name: value for name, _, value in pairs}
    ours = {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    return {**image, **ours, "PATH": f"{Path(sys.executable).parent}:{image['PATH']}"}


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    if reason := unavailable():
        pytest.skip(reason)
    for folder in ("models", *(f"homes/{name}" for name in NODES)):
        (tmp_path / folder).mkdir(parents=True)
    make_checkpoint("mixtral", tmp_path / "models" / "tiny")
    variables = {
        "BLYAN_UID": str(os.getuid()),
        "BLYAN_GID": str(os.getgid()),
        "BLYAN_HOMES": str(tmp_path / "homes"),
        "BLYAN_MODELS": str(tmp_path / "models"),
    }
    compose = read_compose(HOUSE / "docker-compose.yml", variables)
    services = {name: each for name, each in compose.services.items() if not each.profiles}
    with lan("10.81.1") as net:
        made = Swarm(net, services, tmp_path)
        yield made
        for name in net.machines:  # pytest shows it if the test has failed
            print(f"--- {name}\n{made.log(name)}")


def _peers(node: Node) -> set[str]:
    return {peer["peer_id"] for peer in node.call("node.peers")["peers"]}


def _generate(alice: Node) -> dict[str, Any]:
    return alice(
        "generate", "--model", "tiny", "--prompt-ids", ",".join(map(str, PROMPT)),
        "--max-tokens", NEW, "--temperature", 0, "--ignore-eos",
    )  # fmt: skip


def test_from_up_to_an_answer_and_on_after_a_kill(swarm: Swarm) -> None:
    swarm.up()
    alice, workers = swarm.node("alice"), {name: swarm.node(name) for name in WORKERS}
    others = {swarm.node("bootstrap").peer_id} | {node.peer_id for node in workers.values()}
    swarm.until("alice", "connected to everybody", lambda: _peers(alice) == others)
    address = swarm.net.machines["alice"].address
    assert any(f"/{address}/tcp/4040/" in addr for addr in alice.addrs)

    alice("model", "publish", "/srv/models/tiny", "--name", "tiny", "--wait-replicas", 2)
    truth = greedy(swarm.folder / "models" / "tiny", PROMPT, NEW)
    answer = _generate(alice)
    assert answer["token_ids"] == truth
    computed = {peer for expert in answer["trace"].values() for peer in expert["peers"]}
    assert computed and computed <= {node.peer_id for node in workers.values()}

    victim = next(name for name in WORKERS if workers[name].peer_id in computed)
    swarm.net.machines[victim].kill()
    answer = _generate(alice)
    assert answer["token_ids"] == truth
    computed = {peer for expert in answer["trace"].values() for peer in expert["peers"]}
    assert workers[victim].peer_id not in computed

    swarm.start(victim)
    swarm.healthy(victim)
    assert swarm.node(victim).peer_id == workers[victim].peer_id
    _ends_in_peace(swarm)


def _ends_in_peace(swarm: Swarm) -> None:
    """What `docker compose down` does: SIGTERM, to those first on which nobody depends."""
    for name in reversed(in_order(swarm.services)[1:]):
        process = swarm.net.machines[name].process
        process.terminate()
        assert process.wait(COMES_ABOUT_S_MAX) == 0, swarm.log(name)
        assert "Traceback" not in swarm.log(name)
    genesis = json.loads((swarm.folder / "homes" / "network.json").read_text())
    assert genesis["name"] == "compose"
