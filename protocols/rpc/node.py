"""`node.*` and `network.*`: what the node is, whom it knows, and its end."""

from typing import Literal

from protocols.precision import Precision
from protocols.rpc.fields import Count, Request, Result


class StatusRequest(Request, frozen=True):
    """No parameters."""


class Held(Result, frozen=True):
    """Experts that the node computes with for others."""

    experts: Count
    bytes: Count


class Syncing(Result, frozen=True):
    """How far the node is in catching up; `eta_s` is None while there is no estimate."""

    have: Count
    want: Count
    eta_s: float | None


class StatusResult(Result, frozen=True):
    """What a node is, does and waits for.

    `network` is the network's id; `commit` is None where nothing tells it; `syncing` is None once
    the node is level with its peers; `precision` is that in which it holds matrices, as `profile`
    says as well.
    """

    peer_id: str
    role: Literal["main", "gpu"]
    network: str
    version: str
    commit: str | None
    addrs: list[str]
    peers: Count
    blocks: Count
    models: Count
    held: Held
    stored_bytes: Count
    syncing: Syncing | None
    profile: str
    precision: Precision


class IdRequest(Request, frozen=True):
    """No parameters."""


class IdResult(Result, frozen=True):
    """The node's name in the network and the addresses under which it can be dialled."""

    peer_id: str
    addrs: list[str]


class PeersRequest(Request, frozen=True):
    """No parameters."""


class PeerInfo(Result, frozen=True):
    """One connected node; `since` is in s since 1970, `rtt_ms` None until it was measured.

    `bytes_in` and `bytes_out` passed on the streams of the node's own protocols since then.
    """

    peer_id: str
    addrs: list[str]
    role: str
    rtt_ms: float | None
    since: float
    bytes_in: Count
    bytes_out: Count


class PeersResult(Result, frozen=True):
    """The nodes that this one is connected to."""

    peers: list[PeerInfo]


class StopRequest(Request, frozen=True):
    """No parameters."""


class StopResult(Result, frozen=True):
    """The node has begun to stop."""

    stopping: bool


class NetworkRequest(Request, frozen=True):
    """No parameters."""


class NetworkResult(Result, frozen=True):
    """The network's genesis, as in its file: `nonce` is hex."""

    name: str
    id: str
    nonce: str
    parameters: dict[str, int]
