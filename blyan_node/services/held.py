"""An expert that is loaded, why it is, and what there is to say when it cannot be."""

from dataclasses import dataclass
from enum import Enum

from blyan_node.moe.experts import Expert
from protocols.errors import ErrorCode, Refused
from protocols.experts.advert import HeldExpert
from protocols.ids import BlockId, cid_text
from protocols.precision import Precision


class Reason(Enum):
    """Why an expert is loaded."""

    ORDER = "order"  # the operator said so
    PLACEMENT = "placement"  # the swarm's plan
    PASSING = "passing"  # a request of this node needed it


Key = tuple[BlockId, Precision]


@dataclass
class Held:
    """One loaded expert and what it has done since."""

    what: HeldExpert
    precision: Precision
    expert: Expert
    hidden: int  # values in a row
    bytes: int
    reason: Reason
    users: int = 0
    leaving: bool = False
    calls: int = 0
    rows: int = 0
    busy_s: float = 0.0


@dataclass
class NoRoom(Exception):
    """An expert of `size` bytes does not fit into the memory that is `free`."""

    block: BlockId
    size: int
    free: int

    def refused(self) -> Refused:
        """The same, as an operator is told."""
        return Refused(
            ErrorCode.NOT_ALLOWED,
            "the expert does not fit into this node's memory",
            f"it takes {self.size} bytes, {self.free} are free",
            "Start the node with a larger --memory, or drop other experts.",
            {"block": cid_text(self.block)},
        )


def not_an_expert(block: BlockId) -> Refused:
    """What an operator is told who wants to hold what is no expert."""
    return Refused(
        ErrorCode.NOT_FOUND,
        "this block cannot be held",
        "it is not an expert of a model that this node knows",
        "`blyan-node expert list` shows the experts.",
        {"block": cid_text(block)},
    )
