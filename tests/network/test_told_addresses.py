"""What others say of addresses does not have us knock at doors that are none of theirs."""

import trio
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import PeerInfo
from multiaddr import Multiaddr

from blyan_node.testing.echo_node import build
from blyan_node.testing.trio_tests import trio_test
from protocols.ids import cid
from protocols.signing import Identity

NOBODY = Identity.from_seed(bytes([9]) * 32).peer_id


@trio_test
async def test_a_lookup_dials_nobody_whom_an_answer_names() -> None:
    """Mallory's answers name a peer at a port of alice's own machine, which is a service there."""
    service = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    port = service.socket.getsockname()[1]
    alice, mallory = build(1), build(2)
    knocked = trio.Event()

    async def serve(stream: trio.SocketStream) -> None:
        knocked.set()
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [service])
        for node in (alice, mallory):
            await nursery.start(node.run)
        await mallory.connect(alice.addrs[0])
        addr = Multiaddr(f"/ip4/127.0.0.1/tcp/{port}")
        dht = mallory._providers._dht
        mallory._swarm.peerstore.add_addrs(ID.from_base58(NOBODY), [addr], 3600)
        told = PeerInfo(ID.from_base58(NOBODY), [addr])
        assert await dht.routing_table.add_peer(told, skip_server_mode_check=True)
        asked = alice._providers._dht.peer_routing
        with trio.fail_after(15):
            while not asked.routing_table.get_peer_ids():
                await trio.sleep(0.05)
            named = await asked.find_closest_peers_network(cid(b"model")[2:])
        assert ID.from_base58(NOBODY) in named
        assert await alice.find_providers(cid(b"model")) == []
        assert not knocked.is_set()
        nursery.cancel_scope.cancel()
