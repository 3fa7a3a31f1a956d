"""`start`: the daemon in the foreground, from readiness to a drained end."""

import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from blyan_node.config import Config
from blyan_node.home import create_home, is_home, open_home
from blyan_node.logs import JsonLines, start_logging
from blyan_node.rpc.refusals import leaves_of
from blyan_node.settings import Settings
from blyan_node.supervisor import Supervisor
from protocols.errors import Refused, RemoteProtocolError

if TYPE_CHECKING:  # imported when the node starts: they bring torch and libp2p
    from blyan_node.parts import App

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
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_at_once)
    if not is_home(home):
        psk = None if options.psk is None else Path(options.psk)
        create_home(home, role=options.role or "main", network=network, psk=psk)
    if verbose and options.log_level is None:
        options = msgspec.structs.replace(options, log_level="debug")
    read = partial(open_home, home, rpc=rpc, network=network, options=options)
    config = read()
    lines = start_logging(config.log_level, as_json=as_json)
    os.environ.setdefault("OMP_NUM_THREADS", str(config.threads))
    try:
        trio.run(_serve, config, read, lines)
    except ExceptionGroup as group:
        leaves = leaves_of(group)
        told: list[Exception] = [e for e in leaves if isinstance(e, Refused | RemoteProtocolError)]
        told += [e for e in leaves if isinstance(e, OSError) and e.filename]  # a file of the home's
        if not told:
            raise
        raise told[0] from None
    finally:
        logging.shutdown()
    return 0


def _end_at_once(number: int, frame: object) -> None:
    """Ends a process that serves nobody: before the services start, and after they ended."""
    logging.shutdown()
    os._exit(0)


async def _serve(config: Config, read: Callable[[], Config], lines: JsonLines | None) -> None:
    from blyan_node.app import run_app  # seconds of imports: a signal ends them at once
    from blyan_node.reloading import Reloading

    supervisor, had_terminal = Supervisor.of(os.environ), _has_terminal()
    with (
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as ends,
        trio.open_signal_receiver(signal.SIGHUP) as hangups,
    ):

        def on_ready(app: "App") -> None:
            if lines is not None:
                lines.ready(app.readiness())
            else:
                _say(_readiness(config, app.readiness()))
            if supervisor is not None:
                supervisor.ready(app.summary())
                nursery.start_soon(supervisor.report, app.summary)
            nursery.start_soon(follow_hangups, Reloading(app, read), app.summary)

        async def follow_hangups(reloading: Reloading, summary: Callable[[], str]) -> None:
            async for _ in hangups:
                if had_terminal and not _has_terminal():  # it was the terminal that hung up
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                if supervisor is not None:
                    supervisor.reloading()
                await reloading.reload()
                if supervisor is not None:
                    supervisor.ready(summary())

        def on_stop() -> None:
            if supervisor is not None:
                supervisor.stopping()
            _end_by_force_later()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on_signal, ends, nursery.cancel_scope, on_stop)
            await run_app(config, on_ready=on_ready, on_stop=on_stop)
            nursery.cancel_scope.cancel()


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads our output any more; the node goes on
        print(text, flush=True)


def _readiness(config: Config, document: Mapping[str, object]) -> str:
    addrs = document.get("addrs")
    listed = "".join(f"\n  {addr}" for addr in addrs) if isinstance(addrs, list) else ""
    return f"ready: {config.role} node {document.get('peer_id')}{listed}\n  rpc {config.rpc}"


async def _stop_on_signal(
    signals: AsyncIterator[int], scope: trio.CancelScope, on_stop: Callable[[], None]
) -> None:
    async for number in signals:
        if scope.cancel_called:
            os._exit(1)  # asked twice: somebody does not want to wait for the drain
        log.info("%s: draining", signal.Signals(number).name)
        on_stop()
        scope.cancel()


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _end_by_force_later() -> None:
    """Keeps the promise to be gone within 10 s, even if a thread computes for longer."""

    def end() -> None:
        log.warning("not drained after %s s; ending now", DRAIN_S_MAX)
        logging.shutdown()
        os._exit(0)

    timer = threading.Timer(DRAIN_S_MAX, end)
    timer.daemon = True
    timer.start()
