"""`/blyan/expert/1`: activations to a worker and back.

Participants: a requester, which has the trunk, the router and the session, and a worker, which
holds experts and keeps no state between messages. So failover is a retry: the same rows to another
holder give the same bits.

One `Activate` carries all rows of one layer that go to one worker, each row once, and for each
expert its block id and the indexes of its rows. The worker answers with one of

* `Activated`: for each expert in the order asked, for each of its rows in the order asked, the
  unweighted output row: little-endian float32, `hidden` values each;
* `Busy`: its queue is full; nothing has been computed; at once, never after waiting;
* `NotHeld`: it does not hold these blocks; nothing has been computed;
* `Failed`: it could not compute, for a reason that is its own (profile differs, deadline passed).

`within_ms` is how long the requester waits at most; a worker drops what it cannot begin in time.
"""

from typing import NamedTuple

import msgspec

from protocols import limits
from protocols.errors import RemoteProtocolError
from protocols.ids import BlockId, is_cid
from protocols.wire import Messages

PROTOCOL = "/blyan/expert/1"
REQUEST_ID_BYTES = 16
FLOAT_BYTES = 4

MESSAGES = Messages(PROTOCOL)


class ExpertRows(NamedTuple):
    """One expert by its block, and the indexes of the message's rows that it is to see."""

    block: BlockId
    rows: tuple[int, ...]


class Activate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Rows [rows, hidden] of float32 for experts of one layer. `request` is for logs alone."""

    request: bytes
    model: BlockId
    layer: int
    profile: str
    rows: int
    hidden: int
    within_ms: int
    experts: tuple[ExpertRows, ...]
    data: bytes

    @property
    def rows_out(self) -> int:
        """How many rows the answer has."""
        return sum(len(expert.rows) for expert in self.experts)


class Activated(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The output rows."""

    data: bytes


class Busy(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The worker's queue is full with `queue` requests."""

    queue: int


class NotHeld(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The worker does not hold these of the blocks asked for."""

    blocks: tuple[BlockId, ...]


class Failed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The worker could not compute."""

    why: str


Reply = Activated | Busy | NotHeld | Failed

MESSAGES.register(1, Activate, bytes_max=limits.message_bytes_max)
MESSAGES.register(2, Activated, bytes_max=limits.message_bytes_max)
MESSAGES.register(3, Busy, bytes_max=64)
MESSAGES.register(4, NotHeld, bytes_max=limits.control_message_bytes_max)
MESSAGES.register(5, Failed, bytes_max=limits.control_message_bytes_max)


def check_activate(message: Activate) -> None:
    """Whether the message's parts fit each other; raises `RemoteProtocolError`."""

    def refuse(why: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"{PROTOCOL} Activate", why)

    if len(message.request) != REQUEST_ID_BYTES or not is_cid(message.model):
        raise refuse("request id or model id is not one")
    if not 0 <= message.layer < limits.layers_max:
        raise refuse(f"layer {message.layer}")
    if len(message.profile.encode()) > limits.profile_bytes_max:
        raise refuse("the numeric profile's name is too long")
    if (
        not 0 < message.rows <= limits.activation_rows_max
        or not 0 < message.hidden <= limits.hidden_max
    ):
        raise refuse(f"{message.rows} rows of {message.hidden}")
    if not 0 < message.within_ms <= limits.activation_s_max * 1000:
        raise refuse(f"deadline of {message.within_ms} ms")
    if len(message.data) != message.rows * message.hidden * FLOAT_BYTES:
        raise refuse(f"{len(message.data)} bytes do not fit {message.rows} rows")
    if not 0 < len(message.experts) <= limits.experts_per_layer_max:
        raise refuse(f"{len(message.experts)} experts")
    if message.rows_out * message.hidden * FLOAT_BYTES > limits.activation_bytes_max:
        raise refuse(f"an answer of {message.rows_out} rows is too large")
    if len({expert.block for expert in message.experts}) != len(message.experts):
        raise refuse("an expert is named twice")
    for expert in message.experts:
        if not is_cid(expert.block) or not expert.rows:
            raise refuse("an expert without rows or block id")
        if any(not 0 <= row < message.rows for row in expert.rows):
            raise refuse("a row index is out of range")


def check_reply(reply: Reply, asked: Activate) -> None:
    """Whether a reply can be one to `asked`; raises `RemoteProtocolError`."""
    where = f"{PROTOCOL} {type(reply).__name__}"
    if isinstance(reply, Activated):
        size = asked.rows_out * asked.hidden * FLOAT_BYTES
        if len(reply.data) != size:
            raise RemoteProtocolError(where, f"{len(reply.data)} bytes, {size} were asked for")
    elif isinstance(reply, NotHeld):
        blocks = {expert.block for expert in asked.experts}
        if not reply.blocks or not blocks.issuperset(reply.blocks):
            raise RemoteProtocolError(where, "names blocks that were not asked for, or none")
