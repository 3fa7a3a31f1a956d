"""What can be seen of a node from its home: its files, its disk, its port, whether it runs."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from blyan_node.config import Config
from blyan_node.doctor import judging
from blyan_node.identity import load_identity, load_psk
from blyan_node.network.listening import check_free
from protocols.dag.genesis import PRIVATE
from protocols.errors import Refused, RemoteProtocolError
from protocols.ids import cid_text
from protocols.psk import fingerprint
from protocols.rpc.doctor import Finding

_DIAL_S = 5.0


def refusal_finding(name: str, error: Exception) -> Finding:
    """A check that ended with an error, as that error says it."""
    if isinstance(error, Refused):
        return Finding(name, "bad", error.what, error.why, error.next)
    if isinstance(error, RemoteProtocolError):
        return Finding(name, "bad", f"cannot use {error.where}", error.why, "correct it")
    reason = getattr(error, "strerror", None) or str(error)
    path = getattr(error, "filename", None) or "a file"
    return Finding(name, "bad", f"cannot read {path}", reason, "restore it, or its permissions")


def check_key(config: Config) -> Finding:
    """The node's own key."""
    return _guarded("key", lambda: f"peer id {load_identity(config.key_file).peer_id}")


def check_network(config: Config) -> Finding:
    """The network and, where it is private, its key."""

    def look() -> str:
        network = f"{config.genesis.name} ({cid_text(config.genesis.id)})"
        if config.psk is None:
            return f"{network}, open to everybody"
        return f"{network}, private with key {fingerprint(load_psk(config.psk))}"

    if config.psk is None and config.genesis.parameters.get(PRIVATE):
        return Finding(
            "network", "bad", f"the network {config.genesis.name!r} is private",
            "this node has not been given its key", "start it with --psk FILE",
        )  # fmt: skip
    return _guarded("network", look)


def check_disk(config: Config) -> Finding:
    """The disk, of a node that does not run: what its store holds is not counted."""
    path = config.data if config.data.exists() else config.home
    free, writable = shutil.disk_usage(path).free, os.access(path, os.W_OK | os.X_OK)
    return judging.judge_disk(str(path), free, 0, None, writable)


def check_ports(config: Config) -> Finding:
    """Whether a node that does not run could listen."""

    def look() -> str:
        for addr in config.listen:
            check_free(addr)
        return f"{', '.join(config.listen)} are free"

    return _guarded("listen", look)


def check_bootstrap(config: Config) -> Finding:
    """Whether anything answers at the bootstrap addresses; who, only a node that runs can tell."""
    seen = [judging.BootstrapSeen(addr, *_knock(addr)) for addr in config.bootstrap]
    found = judging.judge_bootstrap(seen, 0)
    if found.verdict == "ok":
        return Finding("bootstrap", "ok", f"something answers at all {len(seen)} bootstrap ports")
    return found


def _knock(addr: str) -> tuple[bool, str | None]:
    _, _, host, _, port = addr.split("/")[:5]
    try:
        socket.create_connection((host, int(port)), timeout=_DIAL_S).close()
    except OSError as error:
        return False, (error.strerror or str(error)).lower()
    return True, None


def _guarded(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", look())
    except (Refused, RemoteProtocolError, OSError) as error:
        return refusal_finding(name, error)


def not_running(socket_path: Path) -> Finding:
    """What follows from nobody answering on the RPC socket."""
    return Finding(
        "node", "warn", "it does not run", f"nobody answers on {socket_path}",
        "start it with `blyan-node start`; until then only its home is checked",
    )  # fmt: skip
