"""The doctor's verdicts: each from what was seen, with the next step that fits the cause."""

from dataclasses import replace
from typing import Any

import pytest

from blyan_node.doctor.judging import (
    DISK_WARN_BYTES,
    BootstrapSeen,
    LookSeen,
    PaceSeen,
    judge_bootstrap,
    judge_clock,
    judge_disk,
    judge_listen,
    judge_pace,
    judge_reach,
)
from protocols.limits import MIB, disk_reserve_bytes

ADDR = "/ip4/192.0.2.1/tcp/4040"
LISTEN = ("/ip4/0.0.0.0/tcp/4040",)
LOOK = LookSeen("bob", "192.0.2.1", 3, 5, ((ADDR, ""),))
PACE = PaceSeen(lag_s=0.01, queue=0, gossip_in=1000, gossip_dropped=0, threads=2, cores=2)
UP = BootstrapSeen(ADDR, True, None)


def dead(why: str) -> BootstrapSeen:
    return BootstrapSeen(ADDR, False, why)


@pytest.mark.parametrize(
    ("seen", "peers", "verdict", "next"),
    [
        ([UP], 1, "ok", ""),
        ([], 2, "ok", ""),
        ([], 0, "warn", "--bootstrap"),
        ([UP, dead("refused")], 1, "warn", "take dead addresses out"),
        ([dead("connection refused")], 3, "warn", "take dead addresses out"),
        ([dead("connection refused")], 0, "bad", "its port is open"),
        ([dead("the other side does not share this private network's key")], 0, "bad", "--psk"),
        ([dead("it belongs to network 'x'")], 0, "bad", "--network file"),
        ([dead("a node with another peer id answers there")], 0, "bad", "address anew"),
        ([dead("x is not among its allowed_peers")], 0, "bad", "allowed_peers there"),
    ],
)
def test_bootstrap(seen: list[BootstrapSeen], peers: int, verdict: str, next: str) -> None:
    found = judge_bootstrap(seen, peers)
    assert (found.verdict, next in found.next) == (verdict, True)
    assert found.verdict == "ok" or found.why


@pytest.mark.parametrize(
    ("host", "why", "listen", "announced", "next"),
    [
        ("192.0.2.1", "no answer", LISTEN, [ADDR], "open TCP port 4040 in the firewall"),
        ("198.51.100.9", "refused", LISTEN, [ADDR], "--announce /ip4/198.51.100.9/tcp/4040"),
        ("2001:db8::9", "refused", LISTEN, [ADDR], "--announce /ip6/2001:db8::9/tcp/4040"),
        ("192.0.2.1", "refused", ["/ip4/127.0.0.1/tcp/1"], [], "--listen /ip4/0.0.0.0"),
    ],
)
def test_who_cannot_be_reached_is_told_what_to_do(
    host: str, why: str, listen: list[str], announced: list[str], next: str
) -> None:
    found = judge_reach([replace(LOOK, host=host, tried=((ADDR, why),))], listen, announced)
    assert found.verdict == "bad" and why in found.why and next in found.next


def test_a_peer_through_a_relay_sees_no_address_and_says_nothing() -> None:
    relayed = replace(LOOK, host="", tried=())
    seen = replace(LOOK, tried=((ADDR, "no answer"),))
    assert "in the firewall" in judge_reach([relayed, seen], LISTEN, [ADDR]).next


def test_one_that_got_through_is_enough() -> None:
    other = replace(LOOK, tried=((ADDR, "no answer"),))
    assert judge_reach([other, LOOK], LISTEN, [ADDR]).verdict == "ok"
    assert "connected back" in judge_reach([other, LOOK], LISTEN, [ADDR]).what
    assert judge_reach([], LISTEN, [ADDR]).verdict == "warn"
    assert judge_reach([replace(LOOK, tried=())], LISTEN, [ADDR]).verdict == "warn"


@pytest.mark.parametrize(
    ("offsets", "verdict", "what"),
    [
        ([], "warn", "could not be compared"),
        ([40], "ok", "within 40 ms"),
        ([60_000], "warn", "60 s behind the clock of its one peer"),
        ([600_000, 600_100, 5], "bad", "600 s behind 3 peers' clocks"),
        ([-600_000] * 2, "bad", "600 s ahead of 2 peers' clocks"),
        ([600_000, 10, 20], "ok", "within 20 ms"),  # one peer's clock is wrong, not ours
    ],
)
def test_the_clock_is_compared_with_most_peers(offsets: list[int], verdict: str, what: str) -> None:
    found = judge_clock([replace(LOOK, offset_ms=offset) for offset in offsets])
    assert (found.verdict, what in found.what) == (verdict, True), found


def test_a_look_that_took_long_is_no_proof() -> None:
    assert judge_clock([replace(LOOK, offset_ms=40_000, error_ms=30_000)]).verdict == "ok"


@pytest.mark.parametrize(
    ("free", "stored", "quota", "verdict"),
    [
        (2 * DISK_WARN_BYTES, 0, None, "ok"),
        (2 * DISK_WARN_BYTES, 50 * MIB, 100 * MIB, "ok"),
        (DISK_WARN_BYTES - 1, 0, None, "warn"),
        (disk_reserve_bytes - 1, 0, None, "bad"),
        (2 * DISK_WARN_BYTES, 99 * MIB, 100 * MIB, "bad"),
    ],
)
def test_the_disk(free: int, stored: int, quota: int | None, verdict: str) -> None:
    assert judge_disk("/home/alice", free, stored, quota).verdict == verdict


@pytest.mark.parametrize(
    ("change", "verdict", "next"),
    [
        ({}, "ok", ""),
        ({"lag_s": 0.5}, "warn", "--threads"),
        ({"lag_s": 2.0, "threads": 8}, "bad", "--threads"),
        ({"queue": 200}, "warn", "add nodes"),
        ({"gossip_dropped": 50}, "warn", "sync"),
        ({"threads": 8}, "warn", "--threads 2"),
    ],
)
def test_whether_it_keeps_up(change: dict[str, Any], verdict: str, next: str) -> None:
    found = judge_pace(replace(PACE, **change))
    assert (found.verdict, next in found.next) == (verdict, True)


def test_loopback_is_said_to_be_for_this_machine() -> None:
    assert judge_listen(LISTEN, [ADDR]).verdict == "ok"
    assert judge_listen(LISTEN, ["/ip4/127.0.0.1/tcp/4040"]).verdict == "warn"


def test_a_disk_that_may_not_be_written_is_bad_however_much_is_free() -> None:
    found = judge_disk("/data", 2 * DISK_WARN_BYTES, 0, None, writable=False)
    assert found.verdict == "bad"
    assert found.what == "/data cannot be written" and "mount the disk" in found.next
