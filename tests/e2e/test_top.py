"""`top` in a terminal, before a swarm of real daemons: what it shows, and what it leaves behind."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blyan_node.testing.checkpoints import make_checkpoint
from blyan_node.testing.daemons import Testnet, blyan
from blyan_node.testing.terminal import CTRL_C, Terminal

MakeTestnet = Callable[..., Testnet]
SIZE = (40, 120)
COLOURS = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:[349][0-7]|10[0-7]|[34]8;)[0-9;]*m")


def _top(net: Testnet, *words: object, **env: str) -> Terminal:
    path = net["alice"].rpc
    return Terminal("top", "--rpc", path, *words, term="xterm-256color", size=SIZE, **env)


def _short(net: Testnet, name: str) -> str:
    return net[name].peer_id[-12:]


def test_a_frame_shows_the_peers_and_q_gives_the_terminal_back(swarm: Testnet) -> None:
    with _top(swarm) as terminal:
        terminal.until("blyan-node top")
        terminal.until("peers 3")
        for name in sorted(("bob", "carol", "dave"), key=lambda n: swarm[n].peer_id):
            terminal.until(_short(swarm, name))
        terminal.until("/blyan/")
        terminal.until("peer_up")
        terminal.until("peers 3")  # it looks again
        assert not terminal.as_it_was, "keys are taken one by one meanwhile"
        terminal.press("q")
        assert terminal.ends() == 0
        assert terminal.as_it_was


@pytest.mark.parametrize("leave", [CTRL_C, "Q", "\x1b"])
def test_every_way_out_gives_the_terminal_back(swarm: Testnet, leave: str) -> None:
    with _top(swarm) as terminal:
        terminal.until("blyan-node top")
        terminal.press(leave)
        assert terminal.ends() == 0
        assert terminal.as_it_was
        assert "Traceback" not in terminal.shown


def test_a_signal_gives_the_terminal_back_too(swarm: Testnet) -> None:
    with _top(swarm) as terminal:
        terminal.until("blyan-node top")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ends() == 128 + signal.SIGTERM
        assert terminal.as_it_was


def test_a_peer_that_leaves_is_gone_from_the_next_frame(make_testnet: MakeTestnet) -> None:
    net = make_testnet(3)
    with _top(net) as terminal:
        terminal.until("peers 2")
        net.run("kill", "carol")
        terminal.until("peers 1")
        terminal.until("peer_down")
        terminal.press("q")
        assert terminal.ends() == 0


def test_a_node_that_ends_ends_top_in_words(make_testnet: MakeTestnet) -> None:
    net = make_testnet(1)
    with _top(net) as terminal:
        terminal.until("blyan-node top")
        net.run("kill", "alice")
        assert terminal.ends() == 2
        assert terminal.as_it_was
        assert "went away" in terminal.shown and "Traceback" not in terminal.shown


def test_a_node_that_hangs_is_said_and_top_can_be_left(swarm: Testnet) -> None:
    bob = swarm["bob"].pid
    assert bob is not None
    with Terminal("top", "--rpc", swarm["bob"].rpc, term="xterm", size=SIZE) as terminal:
        terminal.until("peers 3")
        os.kill(bob, signal.SIGSTOP)
        try:
            terminal.until("no answer for")
        finally:
            os.kill(bob, signal.SIGCONT)
        terminal.until("blyan-node top ─")
        terminal.press("q")
        assert terminal.ends() == 0


def test_colours_are_left_out_where_they_are_not_wanted(swarm: Testnet) -> None:
    with _top(swarm, NO_COLOR="1") as terminal:
        terminal.until("peers 3")
        terminal.press("q")
        assert terminal.ends() == 0
        assert not COLOURS.search(terminal.codes)
    with _top(swarm) as terminal:
        terminal.until("peers 3")
        terminal.until("peers 3")  # the first frame is whole
        assert COLOURS.search(terminal.codes)
        terminal.press("q")
        assert terminal.ends() == 0


def test_a_small_terminal_gets_a_frame_that_fits(swarm: Testnet) -> None:
    with Terminal("top", "--rpc", swarm["alice"].rpc, term="xterm", size=(12, 50)) as terminal:
        terminal.until("peers 3")
        terminal.until("peers 3")
        terminal.press("q")
        assert terminal.ends() == 0
        frames = terminal.codes.split("\x1b[H")[1:]
        assert frames
        drawn = [frame.split("\x1b[?1049l")[0] for frame in frames]
        assert [frame for frame in drawn if frame.count("\n") >= 12] == []


def test_on_a_pipe_it_prints_one_frame_without_codes(swarm: Testnet, tmp_path: Path) -> None:
    model = make_checkpoint("mixtral", tmp_path / "model")
    swarm["alice"]("model", "publish", model, "--name", "tiny", "--wait-replicas", 2)
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "--rpc", swarm["alice"].rpc, "top", "--every", "0.2"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "\x1b" not in done.stdout
    assert all(_short(swarm, name) in done.stdout for name in ("bob", "carol", "dave"))
    (row,) = (line.split() for line in done.stdout.splitlines() if line.startswith("tiny "))
    assert row[1] == "mixtral" and row[2] == row[3] and int(row[4]) >= 2


def test_with_json_it_is_one_document(swarm: Testnet) -> None:
    document = blyan("--rpc", swarm["bob"].rpc, "top", "--every", "0.2")
    assert document["status"]["peer_id"] == swarm["bob"].peer_id
    assert {peer["peer_id"] for peer in document["peers"]} == {
        swarm[name].peer_id for name in ("alice", "carol", "dave")
    }
    assert "blyan_peers" in {sample["name"] for sample in document["metrics"]}


def test_a_picture_of_a_frame_is_an_svg(swarm: Testnet, tmp_path: Path) -> None:
    from xml.etree import ElementTree

    blyan("--rpc", swarm["alice"].rpc, "top", "--every", "0.2", "--picture", tmp_path / "a.svg")
    tree = ElementTree.parse(tmp_path / "a.svg")
    assert "url(http" not in (tmp_path / "a.svg").read_text(), "it loads nothing from elsewhere"
    text = "".join(tree.getroot().itertext()).replace("\xa0", " ")
    assert "blyan-node top" in text and _short(swarm, "bob") in text
