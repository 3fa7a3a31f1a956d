"""Two homes behind routers that translate addresses, and one node that everybody can dial.

Real daemons on machines of their own; each router is the kernel's masquerading. Neither home can
dial the other, so what alice asks of bob goes through carol, who holds and reads nothing.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.lan_swarm import PROMPT, TOKENS, LanSwarm, lan_swarm
from blyan_node.testing.namespaces import NamespaceFailed, unavailable
from blyan_node.testing.truth import greedy

ROUTERS = {"alice": "192.168.7", "bob": "192.168.8"}


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LanSwarm]:
    """Carol is public; alice (who asks) and bob (who holds) are each behind a router."""
    if reason := unavailable():
        pytest.skip(reason)
    with lan_swarm("10.81.9", tmp_path_factory.mktemp("lan")) as made:
        try:
            for name, home in ROUTERS.items():
                made.net.start_router(f"router-{name}", home)
        except NamespaceFailed as error:
            pytest.skip(f"this kernel translates no addresses: {error}")
        made.start("carol", "gpu", "--hold", "none")
        made.start("alice", "main", behind="router-alice")
        made.start("bob", "gpu", behind="router-bob")
        yield made
        for name in made.nodes:  # pytest shows it if a test has failed
            print(f"--- {name}\n{made.log(name)}")


def test_experts_behind_a_router_serve_another_home_through_a_relay(
    swarm: LanSwarm, tmp_path: Path
) -> None:
    model = make_checkpoint("mixtral", tmp_path / "tiny")
    swarm.until("relayed", lambda: swarm.peers("alice") == {"bob", "carol"})
    swarm.publish(model, ["bob"])
    tokens, computed = swarm.answer()
    assert (tokens, computed) == (greedy(model, PROMPT, TOKENS), {"bob"})
    asked = {swarm.nodes[name].peer_id for name in ("alice", "bob")}
    told = "".join(swarm.log(name) for name in ("alice", "bob"))
    through = f"through {swarm.nodes['carol'].peer_id}"
    assert any(f"peer {peer} is reached {through}" in told for peer in asked), told


@pytest.mark.parametrize("name", [*ROUTERS])
def test_doctor_says_that_a_node_is_behind_a_router(swarm: LanSwarm, name: str) -> None:
    node = swarm.nodes[name]
    document = node("doctor", "--home", node.home, code=1)
    found = {finding["name"]: finding for finding in document["findings"]}["reachable"]
    router = swarm.net.machines[f"router-{name}"].address
    assert found["verdict"] == "bad"
    assert f"/ip4/{router}/tcp/4040 from peer" in found["why"]
    assert f"it is seen at {router}, which is not its own address: forward TCP" in found["next"]
