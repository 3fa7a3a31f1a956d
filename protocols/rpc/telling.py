"""How a refusal is told to a person and to a program: one form for the command and the node."""

import json

from protocols.errors import Refused
from protocols.rpc import codec

_CONTROL = dict.fromkeys((*range(32), *range(127, 160)))


def lines(refused: Refused) -> list[str]:
    """What happened, why, and what to do next, for stderr."""
    told = [f"error: {refused.what}"]
    if refused.why:
        told.append(f"  why: {refused.why}")
    if refused.next:
        told.append(f"  next: {refused.next}")
    return [one_line(line) for line in told]


def one_line(text: str) -> str:
    """`text`, which may have come from anybody, on one line that no terminal obeys."""
    return " ".join(text.splitlines()).translate(_CONTROL)


def document(refused: Refused) -> str:
    """The JSON document for stdout: `{"error": {"code", "message", "data"}}`."""
    return json.dumps({"error": codec.error_object(refused)}, default=str)
