"""Keeps py-libp2p's own logging out of ours.

It logs what any peer does at warning and error, some of it on the root logger by name. What an
operator should know of peers is said on `blyan.network`.
"""

import logging
import os

import libp2p

_SOURCE = os.path.dirname(libp2p.__file__)


def _is_ours(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(_SOURCE)


def quiet_libp2p() -> None:
    """Silences the library; safe to call again."""
    for name in ("libp2p", "libp2p.network.auto_connector", "multiaddr"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    root = logging.getLogger()
    if _is_ours not in root.filters:
        root.addFilter(_is_ours)
