"""What a hello may say: its texts are shown to people, and a terminal would obey some of them."""

from typing import Any

import msgspec
import pytest

from protocols.errors import RemoteProtocolError
from protocols.hello import Hello, HelloSummary, KnownPeer, check
from protocols.ids import CID_BYTES
from protocols.signing import Identity

PEER = Identity.from_seed(bytes(32)).peer_id
ADDR = "/ip4/192.0.2.1/tcp/4040"
HELLO = Hello(
    protocol_version=1,
    network=bytes(CID_BYTES),
    network_name="ours",
    version="0.1.0",
    role="gpu",
    profile="cpu",
    summary=HelloSummary(log_id=bytes(16), log_length=0),
    addrs=[ADDR],
    peers=[KnownPeer(peer_id=PEER, addrs=[ADDR])],
)


def test_one_in_order_is_let_pass() -> None:
    check(HELLO)


@pytest.mark.parametrize("bad", ["\n", "\x1b[2J", "\x9b2J", "\r", "\u202e"])
def test_nothing_in_it_moves_a_cursor_or_makes_a_second_line(bad: str) -> None:
    changes: list[dict[str, Any]] = [
        {"version": f"0.1.0{bad}"},
        {"network_name": bad},
        {"profile": bad},
        {"addrs": [ADDR, f"{ADDR}{bad}"]},
        {"peers": [KnownPeer(peer_id=PEER, addrs=[f"/dns4/{bad}/tcp/1"])]},
    ]
    for change in changes:
        with pytest.raises(RemoteProtocolError, match="control characters"):
            check(msgspec.structs.replace(HELLO, **change))
