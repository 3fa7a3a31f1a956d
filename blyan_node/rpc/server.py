"""The RPC server: a unix socket (0600, in a folder of 0700) for processes of the same user."""

import errno
import logging
import os
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import trio

from blyan_node.rpc.connection import Bound, Connection, same_user
from blyan_node.rpc.tally import Tally
from protocols import limits
from protocols.errors import ErrorCode, LocalProtocolError, Refused
from protocols.rpc import codec
from protocols.rpc.table import METHODS

log = logging.getLogger(__name__)
BACKLOG = 512


class RpcServer:
    """Listens on `path` and answers with `handlers`, one for every method of the table."""

    def __init__(
        self, path: Path, handlers: Mapping[str, Bound], tally: Tally | None = None
    ) -> None:
        if handlers.keys() != METHODS.keys():
            wrong = sorted(handlers.keys() ^ METHODS.keys())
            raise LocalProtocolError(f"handlers and table differ: {', '.join(wrong)}")
        self.path = path
        self._handlers = handlers
        self._tally = Tally() if tally is None else tally

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled; requests that still run are then told that the node stops."""
        listener = trio.SocketListener(listen(self.path))
        inode = self.path.stat().st_ino
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                await trio.serve_listeners(self._accept, [listener], handler_nursery=nursery)
        finally:
            # Only our own socket: somebody may have put another in its place.
            with suppress(FileNotFoundError):
                if self.path.stat().st_ino == inode:
                    self.path.unlink()

    async def _accept(self, stream: trio.SocketStream) -> None:
        if not same_user(stream.socket, os.getuid()):
            log.warning("an RPC client of another user was turned away")
            await trio.aclose_forcefully(stream)
            return
        if self._tally.connections >= limits.rpc_connections_max:
            await _turn_away(stream)
            return
        self._tally.connections += 1
        try:
            await Connection(stream, self._handlers, self._tally).serve()
        finally:
            self._tally.connections -= 1


async def _turn_away(stream: trio.SocketStream) -> None:
    busy = Refused(
        ErrorCode.BUSY,
        "too many connections",
        f"{limits.rpc_connections_max} clients are connected",
        "close some of them",
    )
    with suppress(trio.BrokenResourceError):
        async with stream:
            with trio.move_on_after(1):
                await stream.send_all(codec.error(None, busy) + b"\n")


def listen(path: Path) -> trio.socket.SocketType:
    """A listening socket at `path`; raises `Refused` if its folder is open to others or taken."""
    _private_folder(path.parent)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | getattr(socket, "SOCK_CLOEXEC", 0))
    try:
        try:
            sock.bind(str(path))
        except OSError as error:
            raise Refused(
                ErrorCode.BAD_INPUT,
                f"cannot listen on {path}",
                error.strerror or str(error),
                "give another path with --rpc",
                {"path": str(path)},
            ) from None
        path.chmod(0o600)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        return trio.socket.from_stdlib_socket(sock)
    except BaseException:
        sock.close()
        raise


def _private_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        if not found.st_mode & 0o077:
            return
        why, following = "others may enter it", f"chmod 700 {folder}"
    else:
        why, following = "it is not a folder of this user", "give another path with --rpc"
    raise Refused(
        ErrorCode.NOT_ALLOWED,
        f"{folder} is no place for the RPC socket",
        why,
        following,
        {"path": str(folder)},
    )


def _remove_stale(path: Path) -> None:
    """Removes the socket of a node that is gone; a live one, or another kind of file, stays."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in (errno.ECONNREFUSED, errno.ENOENT):
                path.unlink(missing_ok=True)
                return
    raise Refused(
        ErrorCode.CONFLICT,
        f"a node already answers on {path}",
        "one socket belongs to one node",
        "stop it with `blyan-node stop`, or give another path with --rpc",
        {"path": str(path)},
    )
