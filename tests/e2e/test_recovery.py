"""Links that are slow, lossy, cut, moved, or let nobody dial in: who comes back, and what is lost.

Real daemons on machines of their own. How long a recovery took is printed and not judged beyond
`COMES_ABOUT_S_MAX`; `blyan-node bench recovery` measures it, after a cut of three minutes too.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.lan_swarm import PROMPT, TOKENS, LanSwarm, lan_swarm
from blyan_node.testing.namespaces import unavailable
from blyan_node.testing.truth import greedy
from protocols.limits import reach_dial_s_max

GPUS = ("bob", "carol")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("mixtral", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def truth(model: Path) -> list[int]:
    return greedy(model, PROMPT, TOKENS)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[LanSwarm]:
    """Alice, and two who both hold everything, each behind a router that lets nobody dial in.

    Later tests find the links as the earlier ones left them: whole.
    """
    if reason := unavailable():
        pytest.skip(reason)
    with lan_swarm("10.81.8", tmp_path_factory.mktemp("lan")) as made:
        made.start("alice", "main")
        made.start("bob", "gpu", dial_in=False)
        made.start("carol", "gpu", dial_in=False)
        made.until("connected", lambda: made.peers("alice") == {*GPUS})
        made.publish(model, GPUS)
        yield made
        for name in made.nodes:  # pytest shows it if a test has failed
            print(f"--- {name}\n{made.log(name)}")


def test_nodes_that_nobody_can_dial_take_part_and_reach_each_other_through_a_relay(
    swarm: LanSwarm, truth: list[int]
) -> None:
    swarm.until("meshed", lambda: swarm.peers("carol") == {"alice", "bob"})
    assert swarm.answer()[0] == truth
    carol = swarm.nodes["carol"]
    document = carol("doctor", "--home", carol.home, code=1)
    found = {finding["name"]: finding for finding in document["findings"]}
    assert found["reachable"]["verdict"] == "bad", found
    assert f"no answer within {reach_dial_s_max} s" in found["reachable"]["why"]
    assert "open TCP port 4040 in the firewall" in found["reachable"]["next"]


def test_a_cut_loses_no_request_that_has_another_holder(swarm: LanSwarm, truth: list[int]) -> None:
    swarm.net.unplug("bob")
    answers = [swarm.answer() for _ in range(5)]
    assert [tokens for tokens, _ in answers] == [truth] * 5
    gone_s = swarm.until("noticed", lambda: swarm.peers("alice") == {"carol"})
    swarm.until("noticed there", lambda: swarm.peers("bob") == set())
    tokens, computed = swarm.answer()
    assert (tokens, computed - {"alice"}) == (truth, {"carol"})
    swarm.net.plug("bob")
    back_s = swarm.until("back", lambda: swarm.peers("alice") == {*GPUS})
    swarm.until("meshed", lambda: swarm.peers("carol") == {"alice", "bob"})
    swarm.until("at work", lambda: "bob" in swarm.answer()[1])
    print(f"noticed after {gone_s:.1f} s, back after {back_s:.1f} s")


def test_a_node_with_another_address_is_found_again(swarm: LanSwarm, truth: list[int]) -> None:
    new = "10.81.8.77"
    swarm.move("bob", new)
    alice, bob = swarm.nodes["alice"], swarm.nodes["bob"]

    def known() -> bool:
        peers = {peer["peer_id"]: peer["addrs"] for peer in alice.call("node.peers")["peers"]}
        return any(f"/{new}/" in addr for addr in peers.get(bob.peer_id, []))

    known_s = swarm.until("known by its new address", known)
    assert [swarm.answer()[0] for _ in range(3)] == [truth] * 3
    swarm.until("meshed", lambda: swarm.peers("bob") == {"alice", "carol"})
    print(f"known by its new address after {known_s:.1f} s")


@pytest.mark.parametrize("round_trip_ms", [20, 80])
def test_answers_are_the_same_over_slow_lossy_links(
    swarm: LanSwarm, truth: list[int], round_trip_ms: int
) -> None:
    """Each frame between two machines goes through two cables, and is lost with 1 %."""
    for name in swarm.nodes:
        swarm.net.worsen(name, delay_ms=round_trip_ms / 4, loss=0.005)
    assert [swarm.answer()[0] for _ in range(3)] == [truth] * 3
    assert swarm.peers("alice") == {*GPUS}
