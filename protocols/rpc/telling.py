"""How a refusal is told to a person and to a program: one form for the command and the node."""

import json

from protocols.errors import Refused
from protocols.rpc import codec


def lines(refused: Refused) -> list[str]:
    """What happened, why, and what to do next, for stderr."""
    told = [f"error: {refused.what}"]
    if refused.why:
        told.append(f"  why: {refused.why}")
    if refused.next:
        told.append(f"  next: {refused.next}")
    return [" ".join(line.splitlines()) for line in told]


def document(refused: Refused) -> str:
    """The JSON document for stdout: `{"error": {"code", "message", "data"}}`."""
    return json.dumps({"error": codec.error_object(refused)}, default=str)
