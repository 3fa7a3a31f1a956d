"""Every exception of a request as the one refusal that its client is told."""

import errno
import logging

from protocols.errors import ErrorCode, Refused, RemoteProtocolError

log = logging.getLogger(__name__)


def refusal_of(error: Exception, method: str) -> Refused:
    """What to tell the client; what is nobody's input is logged as the bug that it is."""
    if isinstance(error, ExceptionGroup):
        leaves = leaves_of(error)
        told = [leaf for leaf in leaves if isinstance(leaf, Refused | RemoteProtocolError)]
        error = told[0] if told else leaves[0] if len(leaves) == 1 else error
    if isinstance(error, Refused):
        return error
    if isinstance(error, RemoteProtocolError):
        return Refused(ErrorCode.BAD_INPUT, f"cannot use {error.where}", error.why)
    if isinstance(error, OSError) and error.errno is not None:
        return refusal_of_os(error)
    log.error("%s failed: a bug of ours", method, exc_info=error)
    return Refused(
        ErrorCode.INTERNAL,
        f"{method} failed inside the node",
        f"{type(error).__name__}: {error}"[:300],
        "the node's log has the details; please report them",
    )


def refusal_of_os(error: OSError) -> Refused:
    """An error of the operating system, with the path that it is about."""
    path = str(error.filename) if error.filename is not None else ""
    data = {"path": path} if path else {}
    reason = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refused(
            ErrorCode.DISK_FULL, "no room on the disk", reason, "free some space, try again", data
        )
    return Refused(ErrorCode.BAD_INPUT, f"cannot use {path or 'a file'}", reason, "", data)


def leaves_of(group: ExceptionGroup[Exception]) -> list[Exception]:
    """The exceptions inside a group, however deep."""
    leaves: list[Exception] = []
    for error in group.exceptions:
        leaves += leaves_of(error) if isinstance(error, ExceptionGroup) else [error]
    return leaves
