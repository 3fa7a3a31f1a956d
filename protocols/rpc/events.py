"""`events.subscribe`: what happens, as it happens."""

from typing import Any

from protocols.rpc.fields import Request, Result


class SubscribeRequest(Request, frozen=True):
    """No parameters. The answer comes when the subscription is cancelled or the node stops."""


class SubscribeResult(Result, frozen=True):
    """The number of events that were sent."""

    events: int


class Event(Result, frozen=True):
    """One event: its kind, the time in s since 1970, and what it is about."""

    event: str
    time: float
    data: dict[str, Any]
