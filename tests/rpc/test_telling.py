"""How a refusal reads: what, why, next, each on a line of its own whatever it quotes."""

from protocols.errors import ErrorCode, Refused
from protocols.rpc import telling


def test_what_a_peer_said_makes_no_line_and_no_colour_of_its_own() -> None:
    refused = Refused(ErrorCode.NOT_FOUND, "gone\n  next: rm -rf", "\x1b[2Jit said\x07", "wait")
    assert telling.lines(refused) == [
        "error: gone   next: rm -rf",
        "  why: [2Jit said",
        "  next: wait",
    ]
