"""Garbage and broken protocols from js-libp2p: a daemon lives, answers, and keeps its peers."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from blyan_node.testing.daemons import Testnet

MakePeer = Callable[..., Any]
pytestmark = pytest.mark.slow
PROTOCOLS = [
    "/ipfs/id/1.0.0",
    "/ipfs/id/push/1.0.0",
    "/ipfs/ping/1.0.0",
    "/ipfs/kad/1.0.0",
    "/meshsub/1.1.0",
    "/blyan/hello/1",
    "/blyan/sync/1",
    "/blyan/chunks/1",
    "/blyan/expert/1",
    "/blyan/adverts/1",
]
BAD: dict[str, list[bytes]] = {
    "random bytes": [random.Random(n).randbytes(400) for n in range(8)],
    "a length without end": [b"\xff" * 64],
    "a huge length": [b"\xff\xff\xff\x7f" + b"x" * 100],
    "half a message": [b"\x80\x02" + b"y" * 20],
    "protobuf with a wrong field": [b"\x06\xff\xff\xff\xff\xff\x0f"],
    "text": [b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"],
    "200 KiB of zeros": [bytes(4096)] * 50,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_makes_no_sense_costs_the_daemon_nothing(
    protocol: str, pair: Testnet, foreign: MakePeer
) -> None:
    alice, bob = pair["alice"], pair["bob"]
    (before,) = alice("peers")["peers"]
    js = foreign("bad", [alice.peer_id])
    for pieces in BAD.values():
        js.begin([alice.peer_id])  # the last may be banned by now
        for end in ("close", "abort"):
            js.tries("raw", addr=alice.addrs[0], protocol=protocol, end=end,
                     data=[piece.hex() for piece in pieces])  # fmt: skip
    good = foreign("good", [alice.peer_id])
    assert good.call("ping", addr=alice.addrs[0])["ms"] >= 0
    assert set(good.event("identified", peer=alice.peer_id)["protocols"]) >= set(PROTOCOLS)
    (after,) = alice("peers")["peers"]
    assert (after["peer_id"], after["since"]) == (bob.peer_id, before["since"]), "bob was lost"
    log = (pair.dir / "alice.log").read_text()
    assert "Traceback" not in log and '"critical"' not in log, log[-3000:]


def test_gossip_that_is_no_block_is_not_spread_and_its_speaker_is_shown_the_door(
    pair: Testnet, foreign: MakePeer
) -> None:
    alice, bob = pair["alice"], pair["bob"]
    speaker = foreign("speaker", [alice.peer_id])
    listener = foreign("listener", [bob.peer_id])
    topic = f"/blyan/{alice('status')['network']}/blocks/1"
    for js, node in ((speaker, alice), (listener, bob)):
        js.call("dial", addr=node.addrs[0])
        js.call("subscribe", topic=topic)
        js.event("grafted", peer=node.peer_id, topic=topic)
    for n in range(8):
        speaker.tries("publish", topic=topic, data=(b"no block %d" % n).hex())
    speaker.event("closed", peer=alice.peer_id)
    assert listener.call("ping", addr=bob.addrs[0])["ms"] >= 0
    assert not [line for line in listener.log if line.get("event") == "message"]
    assert alice("peers")["peers"]


def test_many_streams_are_bounded(pair: Testnet, foreign: MakePeer) -> None:
    alice = pair["alice"]
    js = foreign("many", [alice.peer_id])
    for _ in range(300):
        js.tries("raw", addr=alice.addrs[0], protocol="/ipfs/kad/1.0.0", end="leave", data=["01"])
    good = foreign("good", [alice.peer_id])
    assert good.call("ping", addr=alice.addrs[0])["ms"] >= 0
    assert alice("peers")["peers"]
