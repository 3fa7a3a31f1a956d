"""`events.subscribe`: what happens, as it happens."""

from typing import Annotated, Any, Literal

from msgspec import Meta

from protocols.rpc.fields import Count, Request, Result

EventKind = Annotated[
    Literal["release", "update", "peer_up", "peer_down", "experts", "dropped"],
    Meta(
        description="`release`, `update`: the root of a model has moved (`model`, `root`, `block`, "
        "and the `subject` of an update); `peer_up`, `peer_down` (`peer_id`, `role`); `experts`: "
        "who holds what has changed (`held`: experts with a holder), several changes at once are "
        "one event; `dropped`: so many `events` were left out here, as the subscriber did not read"
    ),
]


class SubscribeRequest(Request, frozen=True):
    """No parameters. The answer comes when the subscription is cancelled or the node stops."""


class SubscribeResult(Result, frozen=True):
    """The number of events that were sent, and of those that the subscriber was too slow for."""

    events: Count
    dropped: Count


class Event(Result, frozen=True):
    """One event: its kind, the time in s since 1970, and what it is about."""

    event: EventKind
    time: float
    data: dict[str, Any]
