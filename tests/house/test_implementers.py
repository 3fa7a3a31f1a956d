"""docs/implementers.md tells what the code does: names, and examples byte for byte."""

import json
import re
from pathlib import Path

import pytest

from blyan_node.testing.blocks import Author, identity
from protocols import hello, reach
from protocols.channel.frames import HEADER, FrameKind
from protocols.dag.genesis import DEVELOPMENT
from protocols.experts import messages as adverts
from protocols.forward import messages as forward
from protocols.ids import cid, cid_text
from protocols.signing import ADVERT_TAG, BLOCK_TAG
from protocols.sync import messages as sync

PAGE = (Path(__file__).parents[2] / "docs" / "implementers.md").read_text()


def examples() -> dict[str, str]:
    """What the page shows, made by the code."""
    alice = identity("alice")
    block = Author("alice").model().block
    greeting = hello.hello_of(
        DEVELOPMENT.id, DEVELOPMENT.name, version="0.1.0", role="gpu", profile="example",
        summary=hello.HelloSummary(), addrs=["/ip4/192.0.2.7/tcp/4040"], peers=[],
    )  # fmt: skip
    message = hello.MESSAGES.encode(greeting)
    frame = HEADER.pack(FrameKind.REQUEST, 1, len(message), len(message)) + message
    return {
        "seed": b"alice".ljust(32, b"\0").hex(),
        "public key": alice.public.hex(),
        "peer id": alice.peer_id,
        "cid of no bytes": cid_text(cid(b"")),
        "network": cid_text(DEVELOPMENT.id),
        "header": block.raw.hex(),
        "block id": cid_text(block.id),
        "signature": block.sig.hex(),
        "block": block.encode().hex(),
        "hello": message.hex(),
        "hello in a frame": frame.hex(),
    }


def test_the_examples_are_what_the_code_makes() -> None:
    (shown,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert json.loads(shown) == examples()


@pytest.mark.parametrize(
    "name",
    [
        hello.PROTOCOL,
        reach.PROTOCOL,
        adverts.PROTOCOL,
        forward.PROTOCOL,
        sync.SYNC_PROTOCOL,
        sync.CHUNKS_PROTOCOL,
        BLOCK_TAG.decode(),
        ADVERT_TAG.decode(),
        "/meshsub/1.1.0",
        "/ipfs/kad/1.0.0",
        "/yamux/1.0.0",
    ],
)
def test_every_name_on_the_wire_is_on_the_page(name: str) -> None:
    assert f"`{name}`" in PAGE


if __name__ == "__main__":
    print(json.dumps(examples(), indent=2))
