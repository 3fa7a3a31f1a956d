"""`rpc.*`: calls about calls."""

from typing import Any

from protocols.rpc.fields import Request, Result


class DiscoverRequest(Request, frozen=True):
    """No parameters."""


class CancelRequest(Request, frozen=True):
    """The id of a request that this connection has sent and that is not answered yet."""

    id: int | str


class CancelResult(Result, frozen=True):
    """Whether there was such a request; its own answer says how it ended."""

    cancelled: bool


class Progress(Result, frozen=True):
    """How far a long request is; `total` is None while it is not known."""

    what: str
    done: int
    total: int | None
    unit: str


OpenRpc = dict[str, Any]
