"""Echo nodes in processes of their own, and waiting for what is heard of them."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from blyan_node.network.interface import PeerEvent
from protocols.ids import PeerId


@contextmanager
def echo_process(seed: int, *bootstrap: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """An echo node; the process and its first address. It is killed at the end."""
    command = [sys.executable, "-m", "blyan_node.testing.echo_node", str(seed), *bootstrap]
    node = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert node.stdout is not None
        yield node, json.loads(node.stdout.readline())["addrs"][0]
    finally:
        node.kill()
        node.wait()
        if node.stdout is not None:
            node.stdout.close()


async def wait_for(
    events: trio.MemoryReceiveChannel[PeerEvent], kind: type[PeerEvent], peer: PeerId
) -> None:
    """Returns when `peer` came or went, as `kind` says."""
    async for event in events:
        if isinstance(event, kind) and event.peer.peer_id == peer:
            return


def peer_of(addr: str) -> PeerId:
    """The peer in a multiaddr that ends in `/p2p/ID`."""
    return PeerId(addr.rpartition("/")[2])
