"""Why a connection failed, in words: py-libp2p has it at the end of a chain of errors."""

import os

from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey

from blyan_node.network.private import NotOurs


def not_ours(error: BaseException | None) -> NotOurs | None:
    """What was wrong with the other side's first bytes, if that is what `error` comes from."""
    while error is not None and not isinstance(error, NotOurs):
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """What a dial failed of."""
    if (stranger := not_ours(error)) is not None:
        return str(stranger)
    while (below := _below(error)) is not None:
        error = below
    if isinstance(error, PeerIDMismatchesPubkey):
        return "a node with another peer id answers there"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return str(error) or type(error).__name__


def _below(error: BaseException) -> BaseException | None:
    if isinstance(error, BaseExceptionGroup):
        first: BaseException = error.exceptions[0]
        return first
    return error.__cause__
