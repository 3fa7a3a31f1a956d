"""`start`: the daemon in the foreground, from readiness to a drained end."""

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import trio

from blyan_node.config import Config, Settings
from blyan_node.home import create_home, is_home, open_home
from blyan_node.logs import JsonLines, start_logging
from blyan_node.rpc.refusals import leaves_of
from protocols.errors import Refused, RemoteProtocolError

log = logging.getLogger(__name__)

DRAIN_S_MAX = 9.0


def start(
    home: Path,
    *,
    rpc: Path | None,
    network: Path | None,
    options: Settings,
    as_json: bool,
    verbose: bool,
) -> int:
    """Runs the node until SIGINT, SIGTERM or `node.stop`; 0 after a clean end.

    Makes the home first if there is none. Raises `Refused` or `RemoteProtocolError` if the node
    cannot start.
    """
    if not is_home(home):
        create_home(home, role=options.role or "main", network=network)
    config = open_home(home, rpc=rpc, network=network, options=options)
    lines = start_logging(as_json=as_json, verbose=verbose)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    try:
        trio.run(_serve, config, lines)
    except ExceptionGroup as group:
        told = [e for e in leaves_of(group) if isinstance(e, Refused | RemoteProtocolError)]
        if not told:
            raise
        raise told[0] from None
    finally:
        logging.shutdown()
    return 0


async def _serve(config: Config, lines: JsonLines | None) -> None:
    # Before the heavy imports, so that a signal during them is heeded too.
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        from blyan_node.app import run_app

        def on_ready(document: Mapping[str, object]) -> None:
            if lines is not None:
                lines.ready(document)
            else:
                print(_readiness(config, document), flush=True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope)
            await run_app(config, on_ready=on_ready, on_stop=_end_by_force_later)
            nursery.cancel_scope.cancel()


def _readiness(config: Config, document: Mapping[str, object]) -> str:
    addrs = document.get("addrs")
    listed = "".join(f"\n  {addr}" for addr in addrs) if isinstance(addrs, list) else ""
    return f"ready: {config.role} node {document.get('peer_id')}{listed}\n  rpc {config.rpc}"


async def _stop_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        if scope.cancel_called:
            os._exit(1)  # asked twice: somebody does not want to wait for the drain
        log.info("%s: draining", signal.Signals(number).name)
        _end_by_force_later()
        scope.cancel()


def _end_by_force_later() -> None:
    """Keeps the promise to be gone within 10 s, even if a thread computes for longer."""

    def end() -> None:
        log.warning("not drained after %s s; ending now", DRAIN_S_MAX)
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(DRAIN_S_MAX, end)
    timer.daemon = True
    timer.start()
