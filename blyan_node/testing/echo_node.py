"""A network node in a process of its own, for tests that kill it or measure it.

    python -m blyan_node.testing.echo_node SEED [BOOTSTRAP...]

It answers `/blyan/echo/1` and prints one JSON line once it listens, and one for each peer that
comes or goes: `{"event": "ready"|"up"|"down", "peer": ID, "addrs": [...]}`.
"""

import json
import sys

import msgspec
import trio

from blyan_node.network.interface import NetworkConfig, PeerUp
from blyan_node.network.network import Network
from protocols.ids import NetworkId, PeerId, cid
from protocols.signing import Identity
from protocols.wire import Messages

PROTOCOL = "/blyan/echo/1"
MESSAGES = Messages(PROTOCOL)
NETWORK = NetworkId(cid(b"echo"))


class Echo(msgspec.Struct, frozen=True):
    """What is sent, and what comes back."""

    data: bytes


MESSAGES.register(1, Echo, bytes_max=3_000_000)


async def echo(_: PeerId, message: Echo) -> Echo:
    """The handler: gives back what came."""
    return message


def build(seed: int, bootstrap: tuple[str, ...] = ()) -> Network:
    """An echo node on a free port of the loopback."""
    config = NetworkConfig(
        NETWORK,
        "echo",
        role="gpu",
        version="test",
        profile="test",
        listen=("/ip4/127.0.0.1/tcp/0",),
        bootstrap=bootstrap,
        seed=seed,
    )
    network = Network(Identity.from_seed(bytes([seed]) * 32), config)
    network.handle(PROTOCOL, MESSAGES, echo)
    return network


def _say(event: str, peer: str, addrs: list[str]) -> None:
    print(json.dumps({"event": event, "peer": peer, "addrs": addrs}), flush=True)


async def _main(seed: int, bootstrap: tuple[str, ...]) -> None:
    network = build(seed, bootstrap)
    events = network.peer_events()
    async with trio.open_nursery() as nursery:
        await nursery.start(network.run)
        _say("ready", network.peer_id, network.addrs)
        async for event in events:
            kind = "up" if isinstance(event, PeerUp) else "down"
            _say(kind, event.peer.peer_id, list(event.peer.addrs))


if __name__ == "__main__":
    trio.run(_main, int(sys.argv[1]), tuple(sys.argv[2:]))
