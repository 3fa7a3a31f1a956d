"""One of the nodes of `gossip-16`.

usage: python -m blyan_node.bench.gossip_node [BOOTSTRAP]

Prints its address, then obeys its input line by line and answers each with a line of JSON:

    peers       how many peers are connected
    publish N   gossips N messages, PAUSE_S apart, each carrying the time
    ask         s for a request and its reply, one for each peer
    heard       s that each message took to get here, for those that have come
"""

import os
import sys
import time

import msgspec
import trio

from blyan_node.bench.far_side import ECHO, ECHO_PROTOCOL, Echo, config_of
from blyan_node.network.network import Network
from protocols.ids import PeerId
from protocols.signing import Identity

MESSAGE_BYTES = 600  # a signed header
PAUSE_S = 0.5
WAITING_MAX = 1_024


class Node:
    """A network node that notes when messages come."""

    def __init__(self, bootstrap: tuple[str, ...]) -> None:
        self.heard: list[float] = []
        self.network = Network(Identity.from_seed(os.urandom(32)), config_of("gpu", bootstrap))
        self.network.handle(ECHO_PROTOCOL, ECHO, self._echo)
        self._gossip = self.network.subscribe("blocks", lambda peer, data: None, WAITING_MAX)

    async def _echo(self, peer: PeerId, message: Echo) -> Echo:
        return message

    async def listen(self) -> None:
        """Notes how old each message is; all nodes share the machine's monotonic clock."""
        async for _, data in self._gossip:
            self.heard.append((time.monotonic_ns() - int.from_bytes(data[:8])) / 1e9)

    async def obey(self, line: str) -> object:
        """Does what one line of input says."""
        verb, *arguments = line.split()
        if verb == "peers":
            return len(self.network.peers)
        if verb == "publish":
            return await self._publish(int(arguments[0]))
        if verb == "ask":
            return [await self._ask(peer) for peer in list(self.network.peers)]
        return self.heard

    async def _publish(self, count: int) -> int:
        for _ in range(count):
            await trio.sleep(PAUSE_S)
            body = os.urandom(MESSAGE_BYTES - 8)
            await self.network.publish("blocks", time.monotonic_ns().to_bytes(8) + body)
        return count

    async def _ask(self, peer: PeerId) -> float:
        message = Echo(os.urandom(MESSAGE_BYTES))
        started = time.perf_counter()
        await self.network.request(peer, ECHO_PROTOCOL, message)
        return time.perf_counter() - started


async def main() -> None:
    """Serves until standard input ends."""
    node = Node(tuple(sys.argv[1:2]))
    async with trio.open_nursery() as nursery:
        await nursery.start(node.network.run)
        nursery.start_soon(node.listen)
        _say(node.network.addrs[0])
        while line := await trio.to_thread.run_sync(sys.stdin.readline):
            _say(await node.obey(line))
        nursery.cancel_scope.cancel()


def _say(value: object) -> None:
    print(msgspec.json.encode(value).decode(), flush=True)


if __name__ == "__main__":
    trio.run(main)
