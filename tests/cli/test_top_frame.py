"""What `top` makes of answers: rates, holders, and a frame that fits and obeys nobody."""

import io
from typing import Any

import pytest
from rich.console import Console

from cli.top.frame import frame
from cli.top.seen import Seen

ALICE, BOB = "12D3KooWaliceaaaaaaaaaaaa", "12D3KooWbobbbbbbbbbbbbbbbb"


def _answers(*, tokens: float = 0, passed: int = 0, peers: int = 1, **names: str) -> dict[str, Any]:
    sample = {"name": "blyan_tokens_total", "labels": {"kind": "new"}, "value": tokens}
    other = {"name": "blyan_tokens_total", "labels": {"kind": "prompt"}, "value": 1000.0}
    traffic = {
        "name": "blyan_network_bytes_total",
        "labels": {"protocol": "/blyan/expert/1", "direction": "in"},
        "value": float(passed),
    }
    peer = {"peer_id": BOB, "role": "gpu", "rtt_ms": 1.5, "addrs": ["/ip4/127.0.0.1/tcp/1/p2p/x"]}
    model = {
        "name": "tiny", "family": "mixtral", "experts": 2, "held": 2, "bytes": 10, "model": "m",
        "root": "0" * 64, "author": "a", **names,
    }  # fmt: skip
    return {
        "node.status": {
            "peer_id": ALICE, "role": "main", "version": "1", "peers": peers, "models": 1,
            "blocks": 3, "stored_bytes": 5, "syncing": None, "held": {"experts": 0, "bytes": 0},
        },
        "node.peers": {
            "peers": [
                {**peer, "peer_id": f"{n}{BOB}" if n else BOB, "bytes_in": passed, "bytes_out": 0}
                for n in range(peers)
            ]
        },
        "model.list": {"models": [model]},
        "expert.stats": {"experts": []},
        "metrics.read": {"samples": [sample, other, traffic]},
    }  # fmt: skip


def _seen(**answers: Any) -> Seen:
    seen = Seen()
    seen.polled(_answers(), 10.0)
    seen.polled(_answers(**answers), 12.0)
    return seen


def _drawn(seen: Seen, width: int = 100, height: int | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    with console.capture() as captured:
        console.print(frame(seen, width, height))
    return captured.get()


def test_rates_are_what_grew_in_the_time_between_two_polls() -> None:
    seen = _seen(tokens=50, passed=4096)
    assert seen.rate("blyan_tokens_total", kind="new") == 25
    assert seen.peer_rate(BOB, "in") == 2048
    assert list(seen.tokens_per_s) == [25]
    assert "tokens/s 25.0" in _drawn(seen)
    assert "2.0 KiB" in _drawn(seen)


def test_a_first_poll_and_a_node_that_started_anew_have_no_rate() -> None:
    seen = Seen()
    seen.polled(_answers(tokens=50), 10.0)
    assert seen.rate("blyan_tokens_total", kind="new") == 0
    seen.polled(_answers(tokens=2), 11.0)
    assert seen.rate("blyan_tokens_total", kind="new") == 0
    seen.polled(_answers(tokens=2, peers=2), 12.0)
    assert seen.peer_rate(f"1{BOB}", "in") == 0, "a peer that has just come"


def test_replicas_are_those_of_the_rarest_expert() -> None:
    seen = _seen()
    alice, bob = {"peer_id": ALICE}, {"peer_id": BOB}
    seen.held("m", [{"holders": [alice, bob]}, {"holders": [bob]}])
    assert seen.holders["m"].replicas == 1
    assert (seen.held_by(ALICE), seen.held_by(BOB)) == (1, 2)
    seen.held("m", [])
    assert (seen.holders["m"].replicas, seen.held_by(BOB)) == (0, 0)


@pytest.mark.parametrize("height", range(8, 60))
def test_a_frame_is_never_taller_than_the_terminal(height: int) -> None:
    seen = _seen(peers=30)
    for n in range(50):
        seen.events.append({"event": "peer_up", "time": 0.0, "data": {"peer_id": str(n)}})
    drawn = _drawn(seen, 80, height)
    assert len(drawn.splitlines()) <= height
    assert all(len(line) <= 80 for line in drawn.splitlines())
    if height >= 30:
        assert "peer_id 49" in drawn, "of the events the newest"
        assert " more" in drawn


def test_a_terminal_with_room_has_everything() -> None:
    drawn = _drawn(_seen(peers=5), 100, 200)
    assert drawn == _drawn(_seen(peers=5), 100)
    assert drawn.count("gpu") == 5 and " more" not in drawn


def test_what_an_author_wrote_moves_no_cursor_and_is_no_markup() -> None:
    drawn = _drawn(_seen(family="\x1b[2J[red]x[/red]\n\x9b31m"))
    assert "\x1b" not in drawn and "\x9b" not in drawn
    assert "[red]x[/red]" in drawn
