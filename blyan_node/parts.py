"""What a node consists of, by name: made by `blyan_node.app`, used by the RPC's handlers."""

from collections.abc import Callable
from dataclasses import dataclass

from blyan_node.config import Config
from blyan_node.in_use import InUse
from blyan_node.metrics.port import MetricsPort
from blyan_node.network.network import Network
from blyan_node.rpc.tally import Tally
from blyan_node.services.chain import Chain
from blyan_node.services.directory import Adverts
from blyan_node.services.export import Export
from blyan_node.services.fetch import Fetch
from blyan_node.services.generation import Generation
from blyan_node.services.gossip import Gossip
from blyan_node.services.holding import Holding
from blyan_node.services.hub import Hub
from blyan_node.services.layers import Layers
from blyan_node.services.models import Models
from blyan_node.services.placement import Placement
from blyan_node.services.publish import Publish
from blyan_node.services.serving import Serving
from blyan_node.services.supply import Supply
from blyan_node.services.sync import Sync
from blyan_node.services.texts import Texts
from blyan_node.services.update import Update
from blyan_node.services.verify import Verify
from protocols.signing import Identity
from storage.store import Store


@dataclass(frozen=True)
class App:
    """A node's objects, for the RPC's handlers. `config` is what it started with, `in_use` has what
    it goes by since. `stop` ends the node as a signal would.

    `began_at` is in s since 1970.
    """

    config: Config
    in_use: InUse
    identity: Identity
    version: str
    profile: str
    store: Store
    network: Network
    chain: Chain
    sync: Sync
    gossip: Gossip
    fetch: Fetch
    supply: Supply
    models: Models
    texts: Texts
    holding: Holding
    serving: Serving
    adverts: Adverts
    layers: Layers
    generation: Generation
    placement: Placement
    publish: Publish
    hub: Hub
    update: Update
    export: Export
    verify: Verify
    metrics: MetricsPort
    tally: Tally
    began_at: float
    stop: Callable[[], None]

    def readiness(self) -> dict[str, object]:
        """What the node says of itself once it serves."""
        return {
            "peer_id": self.identity.peer_id,
            "role": self.config.role,
            "addrs": self.network.addrs,
            "rpc": str(self.config.rpc),
            "version": self.version,
            "profile": self.profile,
            **({"metrics": self.metrics.url} if self.metrics.url else {}),
        }

    def summary(self) -> str:
        """One line for a service manager."""
        stats, held = self.store.stats(), self.holding.advertised()
        return (
            f"{self.config.role}: {len(self.network.peers)} peers, {stats.accepted} blocks,"
            f" {len(held)} experts held, {self.generation.running} requests running"
        )
