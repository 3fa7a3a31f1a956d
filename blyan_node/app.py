"""The composition root: every object of a node, made in the order in which they need each other.

Nobody else constructs a service. Resources whose lifetimes must nest (store, then tasks) are `with`
blocks around the nursery. The order in which services start is the order in which they come to
serve; the network outlasts them, so that adverts are withdrawn while there is one.
"""

import logging
import time
from collections.abc import Callable
from importlib.metadata import version

import trio

from blyan_node.allocation import give_back_after
from blyan_node.config import Config
from blyan_node.identity import load_identity, load_psk
from blyan_node.in_use import InUse
from blyan_node.metrics.exposition import CONTENT_TYPE, exposition
from blyan_node.metrics.port import TEXT, MetricsPort, Page
from blyan_node.moe import arithmetic
from blyan_node.moe.arithmetic import Arithmetic
from blyan_node.moe.devices import OnDevice
from blyan_node.moe.kernels.objects import user_folder
from blyan_node.moe.numerics import use_threads
from blyan_node.moe.profile import Profiles
from blyan_node.network.interface import NetworkConfig
from blyan_node.network.network import Network
from blyan_node.parts import App
from blyan_node.reloading import allowed_peers, placement_config
from blyan_node.rpc.handlers import handlers
from blyan_node.rpc.server import RpcServer
from blyan_node.rpc.tally import Tally
from blyan_node.services.authoring import Author
from blyan_node.services.chain import Chain
from blyan_node.services.directory import AdvertConfig, Adverts
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
from blyan_node.services.trunks import Trunks
from blyan_node.services.update import Update
from blyan_node.services.verify import Verify
from protocols.dag.genesis import PRIVATE
from protocols.errors import ErrorCode, Refused
from protocols.hello import HelloSummary
from protocols.signing import Identity
from storage.store import Store, open_store

log = logging.getLogger(__name__)


def clock_ms() -> int:
    """The wall clock, in ms since 1970."""
    return time.time_ns() // 1_000_000


def choose_arithmetic(config: Config) -> Arithmetic:
    """What the node computes with; takes a second where its machine code is not kept yet."""
    use_threads(config.threads)
    folder = user_folder()
    found = arithmetic.choose(
        config.kernels, threads=config.threads, folder=folder, device=config.device
    )
    log.info("computing with %s", found)
    if found.device is not None:
        log.warning(
            "only nodes with such a device compute with this one;"
            " to work with nodes that have none, start it with --device cpu"
        )
    return found


def room_for_weights(config: Config, numbers: Arithmetic) -> int:
    """What weights and caches may take in bytes: as configured, at most what the device has."""
    room = numbers.room_bytes if isinstance(numbers, OnDevice) else None
    if room is None or room >= config.memory_bytes:
        return config.memory_bytes
    log.warning(
        "%s has room for %d MiB of the %d MiB that memory allows",
        numbers, room >> 20, config.memory_bytes >> 20,
    )  # fmt: skip
    return room


def build(
    config: Config,
    identity: Identity,
    psk: bytes | None,
    store: Store,
    numbers: Arithmetic,
    stop: Callable[[], None],
) -> App:
    """Every object of a node, none of them running."""
    device = "cpu" if numbers.device is None else numbers.device.type
    profiles = Profiles(numbers.name, config.precision, device)
    node_version = version("blyan-node")
    numeric = profiles.own
    compute = trio.CapacityLimiter(1)
    files = trio.CapacityLimiter(2)
    authoring = trio.CapacityLimiter(1)

    network = Network(
        identity,
        NetworkConfig(
            network_id=config.genesis.id,
            network_name=config.genesis.name,
            role=config.role,
            version=node_version,
            profile=numeric,
            listen=config.listen,
            announce=config.announce,
            bootstrap=config.bootstrap,
            psk=psk,
            allowed_peers=allowed_peers(config),
            seed=int.from_bytes(identity.public[:8]),
        ),
        lambda: HelloSummary(log_id=store.log_id, log_length=store.stats().accepted),
    )
    chain = Chain(store, config.genesis.id, clock_ms)
    fetch = Fetch(network, store, lambda block: adverts.holders_of_any_profile(block))
    supply = Supply(store, fetch)
    models = Models(store, supply)
    texts = Texts()
    holding = Holding(
        store,
        supply,
        models,
        room_for_weights(config, numbers),
        numbers,
        config.precision,
    )
    serving = Serving(network, holding, numeric, compute)
    adverts = Adverts(
        network,
        identity,
        AdvertConfig(config.genesis.id, config.role, numeric, config.hold == "auto"),
        holding,
        lambda: serving.queue_length,
        clock_ms,
    )
    sync = Sync(network, chain, fetch)
    gossip = Gossip(network, chain, sync)
    layers = Layers(network, adverts, holding, compute)
    trunks = Trunks(store, supply, holding)
    author = Author(store, identity, config.genesis.id, clock_ms)
    return App(
        config=config,
        in_use=InUse(config),
        identity=identity,
        version=node_version,
        profile=numeric,
        store=store,
        network=network,
        chain=chain,
        sync=sync,
        gossip=gossip,
        fetch=fetch,
        supply=supply,
        models=models,
        texts=texts,
        holding=holding,
        serving=serving,
        adverts=adverts,
        layers=layers,
        generation=Generation(chain, store, models, texts, trunks, layers, compute, profiles),
        placement=Placement(
            placement_config(config, identity, store),
            chain,
            store,
            supply,
            adverts,
            holding,
            identity.peer_id,
        ),
        publish=Publish(store, chain, author, authoring),
        hub=Hub(config.downloads, config.hub_endpoint),
        update=Update(store, chain, author, authoring),
        export=Export(store, supply, files),
        verify=Verify(store, files),
        metrics=MetricsPort(config.metrics),
        tally=Tally(),
        began_at=time.time(),
        stop=stop,
    )


def swarm_key(config: Config) -> bytes | None:
    """The key of the private swarm, if it is one; raises `Refused` where the key is missing."""
    if config.psk is not None:
        return load_psk(config.psk)
    if config.genesis.parameters.get(PRIVATE):
        raise Refused(
            ErrorCode.NOT_ALLOWED,
            f"the network {config.genesis.name!r} is private",
            "this node has not been given its key",
            "give the key file that came with the network: --psk FILE",
        )
    return None


async def run_app(
    config: Config,
    *,
    on_ready: Callable[[App], None],
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Runs a node until it is cancelled or asked to stop; `on_ready` is told once it serves.

    `on_stop` is told when the RPC asks the node to stop.
    Raises `Refused` if the home is in use, the store cannot be opened or an address not be had.
    """
    identity, psk = load_identity(config.key_file), swarm_key(config)
    life, network_life = trio.CancelScope(), trio.CancelScope(shield=True)

    def stop() -> None:
        on_stop()
        life.cancel()

    with open_store(config.data, quota_bytes=config.disk_bytes) as store:
        numbers = await trio.to_thread.run_sync(choose_arithmetic, config)
        app = build(config, identity, psk, store, numbers, stop)
        async with trio.open_nursery() as outlasting:
            await outlasting.start(_run_within, network_life, app.network)
            try:
                with life:
                    await _serve(app, on_ready)
            finally:
                network_life.cancel()
    log.info("stopped")


async def _run_within(
    scope: trio.CancelScope, network: Network, task_status: trio.TaskStatus[None]
) -> None:
    """Runs the network until `scope` is cancelled, however the task around it ends."""
    with scope:
        await network.run(task_status=task_status)


async def _serve(app: App, on_ready: Callable[[App], None]) -> None:
    """Runs the services; they end before the network does, so that they can say goodbye."""
    async with trio.open_nursery() as nursery:
        for service in (app.fetch, app.sync, app.gossip, app.serving, app.adverts, app.placement):
            await nursery.start(service.run)
        await nursery.start(app.texts.run)
        await nursery.start(app.metrics.run, _pages(app))
        nursery.start_soon(give_back_after, app.holding.memory.copying)
        await nursery.start(RpcServer(app.config.rpc, handlers(app), app.tally).run)
        on_ready(app)


def _pages(app: App) -> dict[str, Page]:
    """What the port for metrics shows."""
    return {
        "/metrics": Page(CONTENT_TYPE, lambda: exposition(app)),
        "/health": Page(TEXT, lambda: f"ok: {app.summary()}\n".encode()),
    }
