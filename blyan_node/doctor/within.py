"""What a node that runs finds out about itself: by its peers, its disk and its event loop."""

import os
import shutil
from statistics import median

import trio

from blyan_node.doctor import judging, outside
from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.reach import Looked
from blyan_node.parts import App
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId
from protocols.rpc.doctor import Finding

PEERS_ASKED_MAX = 5
_NAPS, _NAP_S = 20, 0.02


async def examine(app: App) -> list[Finding]:
    """All checks of a node that runs; takes as long as its slowest dial."""
    looks: list[Looked] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app.network.try_bootstrap)
        lag_s = await _lag_s()
    async with trio.open_nursery() as nursery:
        for peer in sorted(app.network.peers)[:PEERS_ASKED_MAX]:
            nursery.start_soon(_look, app, peer, app.network.addrs, looks)
    seen = [_seen(app, look) for look in looks]
    announced = [addr.rpartition("/p2p/")[0] for addr in app.network.addrs]
    return [
        outside.check_network(app.config),
        _bootstrap(app),
        judging.judge_listen(app.config.listen, announced),
        judging.judge_reach(seen, app.config.listen, announced),
        judging.judge_clock(seen),
        judging.judge_disk(
            str(app.config.data),
            shutil.disk_usage(app.config.data).free,
            app.store.stats().chunk_bytes,
            app.store.quota_bytes,
            os.access(app.config.data, os.W_OK | os.X_OK),
        ),
        judging.judge_pace(_pace(app, lag_s)),
    ]


async def _look(app: App, peer: PeerId, addrs: list[str], looks: list[Looked]) -> None:
    try:
        looks.append(await app.network.reach.look(peer, addrs))
    except (PeerGone, PeerRefused, RequestTimeout):
        pass  # it left, is too busy, or is of a release that does not look
    except RemoteProtocolError as error:
        app.network.penalise(peer, error)


def _seen(app: App, look: Looked) -> judging.LookSeen:
    tried = tuple((one.addr, one.why) for one in look.tried)
    name = f"peer …{look.peer[-6:]}"
    return judging.LookSeen(name, look.host, look.offset_ms, look.error_ms, tried)


def _bootstrap(app: App) -> Finding:
    peers = app.network.peers
    seen = [
        judging.BootstrapSeen(f"{addr}/p2p/{peer}", peer in peers, why)
        for peer, addr, why in app.network.bootstrap()
    ]
    return judging.judge_bootstrap(seen, len(peers))


def _pace(app: App, lag_s: float) -> judging.PaceSeen:
    counters = app.network.counters
    return judging.PaceSeen(
        lag_s=lag_s,
        queue=app.serving.queue_length,
        gossip_in=counters.gossip_in,
        gossip_dropped=counters.gossip_dropped,
        threads=app.config.threads,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1_024,
    )


async def _lag_s() -> float:
    """By how much a short nap is too long: the median, as one hiccup is no illness."""
    late = []
    for _ in range(_NAPS):
        began = trio.current_time()
        await trio.sleep(_NAP_S)
        late.append(trio.current_time() - began - _NAP_S)
    return max(0.0, median(late))
