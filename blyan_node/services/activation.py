"""One message to one peer that holds experts: what it is asked to compute, and what it replied."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import PeerNetwork
from blyan_node.services.account import Account
from blyan_node.services.compute import LayerRows, Rows, finite_rows
from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.forward.dispatch import Send
from protocols.forward.grouping import Need
from protocols.forward.messages import (
    PROTOCOL,
    REQUEST_ID_BYTES,
    Activate,
    Activated,
    ExpertRows,
    Reply,
    check_reply,
)


@dataclass(frozen=True)
class Replied:
    """What became of a message: the rows, another reply, or None if it failed."""

    send: Send
    reply: Reply | None
    rows: Rows | None = None


async def ask(network: PeerNetwork, batch: LayerRows, send: Send, account: Account) -> Replied:
    """Has the peer of `send` compute its needs of `batch`. A reply that lies costs the peer."""
    message = _message(batch, send.needs)
    account.remote_calls += 1
    account.retries += send.again
    account.bytes_sent += len(message.data)
    try:
        reply = await network.request(
            send.peer, PROTOCOL, message, timeout_s=limits.activation_s_max
        )
        check_reply(reply, message)
        if isinstance(reply, Activated):
            account.bytes_received += len(reply.data)
            return Replied(send, reply, finite_rows(reply, message))
        return Replied(send, reply)
    except (PeerGone, PeerRefused, RequestTimeout):
        return Replied(send, None)
    except RemoteProtocolError as error:
        network.penalise(send.peer, error)
        return Replied(send, None)


def _message(batch: LayerRows, needs: Sequence[Need]) -> Activate:
    rows = sorted({row for need in needs for row in need.rows})
    places = {row: place for place, row in enumerate(rows)}
    return Activate(
        request=os.urandom(REQUEST_ID_BYTES),
        model=batch.model,
        layer=batch.layer,
        profile=batch.profile,
        rows=len(rows),
        hidden=batch.rows.shape[1],
        within_ms=limits.activation_s_max * 1000,
        experts=tuple(
            ExpertRows(need.block, tuple(places[row] for row in need.rows)) for need in needs
        ),
        data=batch.rows[rows].tobytes(),
    )
