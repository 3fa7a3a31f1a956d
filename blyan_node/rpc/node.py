"""`node.*` and `network.*`."""

from blyan_node.network.traffic import Traffic
from blyan_node.parts import App
from blyan_node.release import COMMIT
from blyan_node.rpc.context import Context
from blyan_node.services.held import Reason
from protocols.ids import cid_text
from protocols.rpc import node


async def status(app: App, request: node.StatusRequest, context: Context) -> node.StatusResult:
    """What the node is, does and waits for."""
    stats = app.store.stats()
    return node.StatusResult(
        peer_id=app.identity.peer_id,
        role=app.config.role,
        network=cid_text(app.config.genesis.id),
        version=app.version,
        commit=COMMIT,
        addrs=list(app.network.addrs),
        peers=len(app.network.peers),
        blocks=stats.accepted,
        models=len(app.chain.models()),
        held=held(app),
        stored_bytes=stats.chunk_bytes,
        syncing=app.sync.syncing(),
        profile=app.profile,
        precision=app.config.precision,
    )


def held(app: App) -> node.Held:
    """The experts that are kept for others."""
    kept = [expert for expert in app.holding.held() if expert.reason is not Reason.PASSING]
    return node.Held(experts=len(kept), bytes=sum(expert.bytes for expert in kept))


async def show_id(app: App, request: node.IdRequest, context: Context) -> node.IdResult:
    """The node's name in the network."""
    return node.IdResult(peer_id=app.identity.peer_id, addrs=list(app.network.addrs))


async def peers(app: App, request: node.PeersRequest, context: Context) -> node.PeersResult:
    """The nodes that it is connected to."""
    traffic = app.network.ledger.peers
    found = []
    for _, peer in sorted(app.network.peers.items()):
        passed = traffic.get(peer.peer_id, Traffic())
        found.append(
            node.PeerInfo(
                peer_id=peer.peer_id,
                addrs=list(peer.addrs),
                role=peer.role,
                rtt_ms=peer.rtt_ms,
                since=peer.since,
                bytes_in=passed.bytes_in,
                bytes_out=passed.bytes_out,
            )
        )
    return node.PeersResult(peers=found)


async def stop(app: App, request: node.StopRequest, context: Context) -> node.StopResult:
    """Begins to stop the node; the answer is still sent."""
    context.after_reply(app.stop)
    return node.StopResult(stopping=True)


async def network(app: App, request: node.NetworkRequest, context: Context) -> node.NetworkResult:
    """The genesis of the network that the node is in."""
    genesis = app.config.genesis
    return node.NetworkResult(
        name=genesis.name,
        id=cid_text(genesis.id),
        nonce=genesis.nonce.hex(),
        parameters=dict(genesis.parameters),
    )
