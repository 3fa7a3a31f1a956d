"""A js-libp2p peer and running daemons: identify, ping, gossip and DHT, both ways."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blyan_node.bench.models import write_model
from blyan_node.identity import load_identity
from blyan_node.testing.daemons import Node, Testnet
from blyan_node.testing.foreground import Foreground
from protocols import hello
from protocols.channel.frames import HEADER, FrameKind
from protocols.dag.header import CHAIN_OF, Block, Header, Kind
from protocols.ids import BlockId, ManifestId, NetworkId, Subject, cid, cid_text, parse_cid
from protocols.tensors.manifest import Dtype

MakePeer = Callable[..., Any]
pytestmark = pytest.mark.slow
STANDARD = {"/ipfs/id/1.0.0", "/ipfs/ping/1.0.0", "/ipfs/kad/1.0.0", "/meshsub/1.1.0"}
SMALL: dict[str, object] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_local_experts": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
OURS = {"/blyan/hello/1", "/blyan/sync/1", "/blyan/chunks/1", "/blyan/adverts/1"}


def _meets(js: Any, node: Node) -> str:
    """Connects a foreign peer to a node; its topic of blocks, once each is in the other's mesh."""
    js.call("dial", addr=node.addrs[0])
    topic = f"/blyan/{node('status')['network']}/blocks/1"
    js.call("subscribe", topic=topic)
    js.event("grafted", peer=node.peer_id, topic=topic)
    return topic


def test_both_identify_each_other_and_pings_are_answered(pair: Testnet, foreign: MakePeer) -> None:
    js, alice = foreign("js"), pair["alice"]
    dialled = js.call("dial", addr=alice.addrs[0])
    assert (dialled["peer"], dialled["muxer"]) == (alice.peer_id, "/yamux/1.0.0")
    told = js.event("identified", peer=alice.peer_id)
    assert set(told["protocols"]) >= STANDARD | OURS
    assert any(addr in alice.addrs[0] for addr in told["addrs"])
    assert told["observed"].startswith("/ip4/127.0.0.1/tcp/")
    js.event("stream", protocol="/ipfs/id/1.0.0", direction="inbound")
    for _ in range(3):
        assert js.call("ping", addr=alice.addrs[0])["ms"] >= 0
    assert js.peer_id not in str(alice("peers"))  # it has said no hello


def test_a_daemon_dials_a_foreign_peer(foreign: MakePeer, tmp_path: Path) -> None:
    js = foreign("js")
    with Foreground(tmp_path / "carol", "--bootstrap", js.addr) as carol:
        told = js.event("identified", peer=carol.peer_id)
        assert set(told["protocols"]) >= STANDARD | OURS
        js.event("subscriptions", peer=carol.peer_id)
        assert js.call("ping", addr=carol.addrs[0])["ms"] >= 0


def _publish(node: Node, name: str, folder: Path) -> str:
    """Publishes a small model; its id."""
    model = write_model(folder / "m", Dtype.F32, **SMALL)
    node("model", "publish", model, "--name", name)
    return str(node("model", "show", name)["model"])


def test_what_a_daemon_publishes_is_heard(pair: Testnet, foreign: MakePeer, tmp_path: Path) -> None:
    js, alice = foreign("js"), pair["alice"]
    topic = _meets(js, alice)
    model = _publish(alice, "heard", tmp_path)
    heard = Block.decode(bytes.fromhex(js.event("message", topic=topic)["data"]))
    assert heard.signature_holds() and heard.header.kind is Kind.RELEASE
    assert heard.header.model == parse_cid(model)
    assert alice("block", "show", cid_text(heard.id))["accepted"]


def _update(author: Node, subject: str) -> Block:
    """A new head for a part of alice's model, with the bytes that it has: signed and not sent."""
    shown = author("model", "show", "small")
    head = shown["subjects"][subject]["block"]
    old = author("block", "show", head)
    identity = load_identity(author.home / "identity.key")
    model, base = BlockId(parse_cid(shown["model"])), BlockId(parse_cid(head))
    header = Header(
        net=NetworkId(parse_cid(old["network"])),
        chain=CHAIN_OF[Kind(old["kind"])],
        kind=Kind(old["kind"]),
        author=identity.public,
        seq=old["seq"] + 1000,
        time=time.time_ns() // 1_000_000,
        depends_on=tuple(sorted({model, base})),
        model=model,
        subject=Subject(subject),
        base=base,
        body=ManifestId(parse_cid(old["body"])),
        size=old["size"],
    )
    return Block.create(header, identity)


def test_what_a_foreign_peer_publishes_is_judged_and_taken_over(
    pair: Testnet, foreign: MakePeer
) -> None:
    alice, bob = pair["alice"], pair["bob"]
    speaker = foreign("speaker", [alice.peer_id])
    listener = foreign("listener", [bob.peer_id])
    topic = _meets(speaker, alice)
    _meets(listener, bob)
    block = _update(alice, "layer0.expert1")
    sent = speaker.call("publish", topic=topic, data=block.encode().hex())
    assert alice.peer_id in sent["recipients"]
    for node in (alice, bob):

        def is_head(node: Node = node) -> bool:
            parts = node("model", "show", "small")["subjects"]
            return bool(parts["layer0.expert1"]["block"] == cid_text(block.id))

        node.until("the head from the foreign peer", is_head)
    heard = listener.event("message", topic=topic, data=block.encode().hex())
    assert heard["from"] == speaker.peer_id


def test_a_block_with_a_false_signature_goes_nowhere(pair: Testnet, foreign: MakePeer) -> None:
    alice = pair["alice"]
    speaker, listener = (foreign(name, [alice.peer_id]) for name in ("speaker", "listener"))
    topic = _meets(speaker, alice)
    _meets(listener, alice)
    good = _update(alice, "layer0.expert2")
    forged = Block(good.id, good.header, good.raw, bytes(64))
    speaker.call("publish", topic=topic, data=forged.encode().hex())
    speaker.call("publish", topic=topic, data=good.encode().hex())
    listener.event("message", topic=topic, data=good.encode().hex())
    assert forged.encode().hex() not in str(listener.log)


def test_the_dht_answers_about_what_daemons_provide(pair: Testnet, foreign: MakePeer) -> None:
    js, alice, bob = foreign("js"), pair["alice"], pair["bob"]
    js.call("dial", addr=alice.addrs[0])
    js.event("identified", peer=alice.peer_id)
    model = alice("model", "show", "small")["model"]
    assert bob.peer_id in js.call("providers", cid=model)["providers"]
    closest = js.call("closest", cid=model)
    assert {*closest["peers"]} >= {alice.peer_id, bob.peer_id}, closest["errors"]


def test_the_dht_keeps_what_a_foreign_peer_provides(pair: Testnet, foreign: MakePeer) -> None:
    one, other = foreign("one"), foreign("other")
    alice = pair["alice"]
    for js in (one, other):
        js.call("dial", addr=alice.addrs[0])
        js.event("identified", peer=alice.peer_id)
    key = cid_text(cid(b"something that only a foreign peer has"))
    one.call("provide", cid=key)
    assert one.peer_id in other.call("providers", cid=key)["providers"]


def test_a_foreign_peer_that_says_hello_is_a_peer(pair: Testnet, foreign: MakePeer) -> None:
    """The bytes of docs/implementers.md, with the network of these daemons, from js-libp2p."""
    alice = pair["alice"]
    js = foreign("js", [alice.peer_id])
    greeting = hello.hello_of(
        NetworkId(parse_cid(alice("status")["network"])), "a name", version="0.1.0", role="gpu",
        profile="example", summary=hello.HelloSummary(), addrs=[], peers=[],
    )  # fmt: skip
    message = hello.MESSAGES.encode(greeting)
    frame = HEADER.pack(FrameKind.REQUEST, 1, len(message), len(message)) + message
    js.call("raw", addr=alice.addrs[0], protocol=hello.PROTOCOL, data=[frame.hex()], end="leave")

    def is_there() -> bool:
        return js.peer_id in {peer["peer_id"] for peer in alice("peers")["peers"]}

    alice.until("the foreign peer among the peers", is_there)
