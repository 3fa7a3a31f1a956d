"""The parts of the network that need no socket: addresses, address book, scores, queues, pace."""

import contextlib
import random

import pytest
import trio
from multiaddr import Multiaddr

from blyan_node.network.addressbook import AddressBook
from blyan_node.network.addresses import (
    announced,
    dialable,
    dialable_ones,
    is_own,
    parse_bootstrap,
    parse_listen,
    split_peer,
)
from blyan_node.network.fanout import Fanout
from blyan_node.network.pace import Pace, Recent
from blyan_node.network.peers import PeerTable, Scores
from blyan_node.testing.trio_tests import trio_test
from protocols.errors import Refused, RemoteProtocolError
from protocols.hello import (
    MESSAGES,
    Hello,
    HelloSummary,
    KnownPeer,
    check,
    hello_of,
    judge,
)
from protocols.ids import NetworkId, PeerId, cid
from protocols.limits import (
    ban_s,
    gossip_burst_max,
    gossip_bytes_per_token,
    gossip_per_s_max,
    hearsay_dials_max,
    hearsay_per_peer_max,
    hello_addrs_max,
    hello_peers_max,
    known_peer_s_max,
    known_peers_max,
    mesh_peers_max,
    peers_max,
    redial_s,
    redial_s_max,
    score_halflife_s,
)
from protocols.signing import Identity

ALICE, BOB, CAROL = (Identity.from_seed(bytes([i]) * 32).peer_id for i in (1, 2, 3))
ADDR = "/ip4/192.0.2.7/tcp/4040"


def peer(number: int) -> PeerId:
    return Identity.from_seed(number.to_bytes(32, "big")).peer_id


# Addresses


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (ADDR, True),
        ("/ip6/::1/tcp/4040", True),
        ("/dns4/node.example.org/tcp/4040", True),
        ("/ip4/0.0.0.0/tcp/4040", False),
        ("/ip6/::/tcp/4040", False),
        ("/ip4/192.0.2.7/tcp/0", False),
        ("/ip4/192.0.2.7/udp/4040", False),
        ("/ip4/192.0.2.7/tcp/4040/ws", False),
        ("/ip4/300.0.2.7/tcp/4040", False),
        ("/unix/x/tcp/1", False),
        ("/ip4/::1/tcp/1", False),
        ("/ip4/224.0.0.1/tcp/1", False),
        ("/ip6/ff02::1/tcp/1", False),
        ("/ip6/::ffff:127.0.0.1/tcp/1", False),
        ("/ip6/fe80::1%eth0/tcp/1", False),
        ("/dns4/a b/tcp/1", False),
        ("/ip4/192.0.2.7/tcp/+40", False),
        ("/ip4/192.0.2.7/tcp/65536", False),
        ("/ip4", False),
        ("", False),
        ("/ip4/192.0.2.7/tcp/4040" + "0" * 200, False),
    ],
)
def test_which_addresses_are_dialled(text: str, good: bool) -> None:
    assert dialable(text) is good


def test_10_000_texts_that_peers_may_call_addresses() -> None:
    chance = random.Random(1)
    parts = [
        "/",
        "/ip4/192.0.2.7",
        "/tcp/",
        "ip4",
        "ip6",
        "dns",
        "tcp",
        "p2p",
        "192.0.2.7",
        "::",
        "4040",
        "é",
        "\0",
        ALICE,
        "x",
    ]
    for _ in range(10_000):
        text = "".join(chance.choices(parts, k=chance.randrange(9)))
        if dialable(text):
            Multiaddr(text)
        with contextlib.suppress(RemoteProtocolError):
            split_peer(text)


def test_a_bootstrap_address_needs_the_peer_id() -> None:
    assert parse_bootstrap(f"{ADDR}/p2p/{ALICE}") == (ADDR, ALICE)
    for bad in (ADDR, f"{ADDR}/p2p/", f"{ADDR}/p2p/QmNotEd25519", f"/ip4/1.2.3.4/p2p/{ALICE}"):
        with pytest.raises(Refused, match="not an address to start from"):
            parse_bootstrap(bad)


def test_listen_addresses() -> None:
    for good in ("/ip4/0.0.0.0/tcp/4040", "/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/1"):
        assert parse_listen(good) == good
    for bad in ("", "4040", "/ip4/0.0.0.0", "/ip4/x/tcp/1", "/ip4/1.2.3.4/tcp/70000", ADDR + "/ws"):
        with pytest.raises(Refused, match="not an address to listen on"):
            parse_listen(bad)


def test_what_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "blyan_node.network.addresses.get_network_addrs"
    monkeypatch.setattr(module, lambda version: ["10.0.0.5", "192.0.2.7"])
    everywhere = ["/ip4/0.0.0.0/tcp/4040"]
    assert announced(everywhere, ()) == ["/ip4/10.0.0.5/tcp/4040", "/ip4/192.0.2.7/tcp/4040"]
    assert announced(["/ip4/127.0.0.1/tcp/1"], ()) == ["/ip4/127.0.0.1/tcp/1"]
    assert announced(everywhere, (f"/dns4/a.b/tcp/1/p2p/{ALICE}",)) == ["/dns4/a.b/tcp/1"]
    monkeypatch.setattr(module, lambda version: ["fe80::5", "fd00::5"])
    assert announced(["/ip6/::/tcp/4040"], ()) == ["/ip6/fd00::5/tcp/4040"]
    monkeypatch.setattr(module, lambda version: [])
    assert announced(everywhere, ()) == ["/ip4/127.0.0.1/tcp/4040"]


def test_a_peer_tells_few_addresses() -> None:
    many = [f"/ip4/192.0.2.7/tcp/{port}" for port in range(1, 50)]
    assert dialable_ones([ADDR, "junk", ADDR, *many]) == [ADDR, *many[: hello_addrs_max - 1]]


def test_what_means_another_machine_here_than_there_is_taken_from_neighbours_alone() -> None:
    own = ["/ip4/127.0.0.9/tcp/1", "/ip6/::1/tcp/1", "/ip4/169.254.169.254/tcp/80"]
    others = [ADDR, "/ip4/10.0.0.5/tcp/1", "/ip6/fd00::5/tcp/1", "/dns4/localhost/tcp/1"]
    assert dialable_ones([*own, *others]) == [*own, *others]
    assert dialable_ones([*own, "/ip6/fe80::5/tcp/1", *others], from_here=False) == others


def test_which_hosts_are_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {4: ["10.0.0.5"], 6: ["fd00::5"]}
    monkeypatch.setattr("blyan_node.network.addresses.get_network_addrs", kept.__getitem__)
    assert all(is_own(host) for host in ("127.0.0.1", "::1", "10.0.0.5", "fd00::5"))
    assert not any(is_own(host) for host in ("", "10.0.0.6", "fe80::1%eth0", "192.0.2.7"))


# The address book


def book(seed: int = 0) -> AddressBook:
    return AddressBook(ALICE, random.Random(seed))


def test_backoff_doubles_to_its_limit_with_jitter_from_the_seed() -> None:
    def waits(seed: int) -> list[float]:
        entries = book(seed)
        entries.add_bootstrap(BOB, ADDR)
        now, waited = 0.0, []
        for _ in range(10):
            entries.failed(BOB, now)
            due = entries.next_due(now, ())
            assert due is not None
            waited.append(due - now)
            now = due
        return waited

    first = waits(1)
    for i, wait in enumerate(first):
        plain = min(redial_s * 2**i, redial_s_max)
        assert 0.5 * plain <= wait <= 1.5 * plain
    assert waits(1) == first and waits(2) != first


def test_who_is_due() -> None:
    entries = book()
    entries.add_bootstrap(BOB, ADDR)
    entries.learn(CAROL, [ADDR], 0.0)
    entries.learn(ALICE, [ADDR], 0.0)
    assert entries.due(0.0, ()) == [BOB, CAROL]
    assert entries.due(0.0, {BOB}) == [CAROL]
    entries.failed(CAROL, 0.0)
    assert entries.due(0.1, {BOB}) == [] and entries.due(2.0, {BOB}) == [CAROL]
    entries.connected(CAROL, 100.0)
    entries.lost(CAROL, 101.0)
    assert entries.due(101.0, {BOB}) == [] and entries.due(103.0, {BOB}) == [CAROL]


def test_a_full_mesh_of_small_swarms_and_bootstrap_peers_always() -> None:
    entries = book()
    connected = {peer(i) for i in range(100, 100 + mesh_peers_max)}
    entries.learn(CAROL, [ADDR], 0.0)
    assert entries.due(0.0, connected) == []
    entries.add_bootstrap(BOB, ADDR)
    assert entries.due(0.0, connected) == [BOB]
    assert entries.due(0.0, set(list(connected)[1:])) == [BOB]


def test_peers_out_of_reach_are_forgotten_and_bootstrap_peers_never() -> None:
    entries = book()
    entries.add_bootstrap(BOB, ADDR)
    entries.learn(CAROL, [ADDR], 0.0)
    for known in (BOB, CAROL):
        entries.failed(known, known_peer_s_max + 1.0)
    assert BOB in entries and CAROL not in entries
    entries.learn(CAROL, [ADDR], 0.0)
    for known in (BOB, CAROL):
        entries.refused(known, 10.0)
    assert BOB in entries and CAROL not in entries
    assert entries.due(11.0, ()) == []


def test_the_book_is_bounded_and_has_room_for_who_speaks_for_himself() -> None:
    entries = book()
    entries.add_bootstrap(BOB, ADDR)
    entries.learn(CAROL, [ADDR], 0.0)
    entries.connected(CAROL, 0.0)
    for i in range(known_peers_max + 10):
        entries.learn(peer(i), [f"/ip4/192.0.2.7/tcp/{i + 1}"], float(i))
    assert len(entries._entries) == known_peers_max
    assert BOB in entries and CAROL in entries and peer(0) not in entries
    assert peer(known_peers_max + 9) in entries
    last = peer(known_peers_max)
    for port in range(1, 1000):
        entries.learn(last, [f"/ip4/192.0.2.8/tcp/{port}"], 0.0)
        entries.hear(last, [f"/ip4/192.0.2.9/tcp/{port}"], 0.0, BOB)
        entries.worked(last, f"/ip4/192.0.2.10/tcp/{port}")
    assert len(entries.addrs(last)) <= 2 * hello_addrs_max


def test_one_liar_cannot_fill_the_book_nor_push_anybody_out() -> None:
    entries = book()
    for i in range(500):
        entries.hear(peer(i), [ADDR], 0.0, CAROL)
    assert len(entries._entries) == hearsay_per_peer_max
    tellers = [peer(10_000 + i) for i in range(known_peers_max)]
    for i, teller in enumerate(tellers):  # many liars share what there is
        for j in range(3):
            entries.hear(peer(20_000 + 3 * i + j), [ADDR], 0.0, teller)
    assert len(entries._entries) == known_peers_max
    entries.hear(BOB, [ADDR], 0.0, Identity.from_seed(bytes([77]) * 32).peer_id)
    assert BOB in entries  # a new teller is heard all the same
    dave = peer(77_777)
    entries.learn(dave, [ADDR], 0.0)
    assert dave in entries and entries.due(0.0, ())[0] == dave


def test_hearsay_displaces_nothing_that_is_better_known() -> None:
    entries = book()
    lies = [f"/ip4/198.51.100.1/tcp/{port}" for port in range(1, 1 + hello_addrs_max)]
    other = "/ip4/192.0.2.8/tcp/1"
    entries.learn(BOB, [ADDR, other], 0.0)
    entries.failed(BOB, 0.0)
    due = entries.next_due(0.0, ())
    entries.hear(BOB, lies, 0.1, CAROL)
    assert entries.addrs(BOB) == [ADDR, other, *lies]
    assert entries.next_due(0.1, ()) == due  # and lies are no reason to dial sooner
    entries.failed(BOB, 1.0)
    assert entries.addrs(BOB) == [ADDR, other]
    entries.hear(BOB, lies, 1.0, CAROL)
    entries.learn(BOB, [other], 2.0)
    assert entries.addrs(BOB) == [other]


def test_who_is_known_by_hearsay_alone_is_dialled_last_and_soon_forgotten() -> None:
    entries = book()
    entries.hear(CAROL, [ADDR], 0.0, ALICE)
    entries.learn(BOB, [ADDR], 0.0)
    assert entries.teller(CAROL) is not None and entries.teller(BOB) is None
    assert entries.due(0.0, ()) == [BOB, CAROL]
    for _ in range(hearsay_dials_max):
        assert CAROL in entries
        for known in (BOB, CAROL):
            entries.failed(known, 0.0)
    assert CAROL not in entries and BOB in entries
    entries.hear(CAROL, [ADDR], 0.0, ALICE)
    entries.learn(CAROL, [ADDR], 0.0)  # it came itself
    assert entries.teller(CAROL) is None


def test_nothing_is_due_later_while_what_is_due_waits_for_room() -> None:
    entries = book()
    entries.learn(BOB, [ADDR], 0.0)
    assert entries.due(5.0, ()) == [BOB] and entries.next_due(5.0, ()) is None


def test_the_address_that_worked_is_tried_first() -> None:
    entries = book()
    entries.learn(BOB, [ADDR, "/ip4/192.0.2.8/tcp/1"], 0.0)
    entries.worked(BOB, "/ip4/192.0.2.8/tcp/1")
    assert entries.addrs(BOB)[0] == "/ip4/192.0.2.8/tcp/1"


# Scores and the table


def test_scores_fade_and_ban_for_a_while() -> None:
    scores = Scores()
    assert scores.score(BOB, 0.0) == 0
    assert [scores.hurt(BOB, -20, 0.0) for _ in range(5)] == [False] * 4 + [True]
    assert scores.banned(BOB, 1.0) and not scores.banned(CAROL, 1.0)
    assert not scores.banned(BOB, ban_s + 1.0)
    scores.hurt(CAROL, -20, 0.0)
    assert scores.score(CAROL, score_halflife_s) == pytest.approx(-10)
    for i in range(10_000):
        scores.hurt(peer(i), -20, float(i))
    assert len(scores._scores) <= 4 * peers_max


def told(**changes: object) -> Hello:
    hello = hello_of(
        NetworkId(cid(b"n")),
        "n",
        version="1",
        role="gpu",
        profile="p",
        summary=HelloSummary(),
        addrs=[ADDR],
        peers=[(CAROL, [ADDR])],
    )
    fields = {name: getattr(hello, name) for name in hello.__struct_fields__}
    return Hello(**(fields | changes))


def test_the_table() -> None:
    table = PeerTable()
    assert table.add(BOB, told(), unix_s=5.0, now=0.0) is not None
    assert table.add(BOB, told(role="main"), unix_s=9.0, now=1.0) is None
    assert table[BOB].role == "main" and table[BOB].since == 5.0
    table.measured(BOB, 4.0)
    table.measured(BOB, 8.0)
    assert table[BOB].rtt_ms == pytest.approx(5.0)
    assert table.silent(10.0, 16) == [] and table.silent(20.0, 16) == [BOB]
    table.heard(BOB, 20.0, HelloSummary(log_length=3))
    assert table.silent(20.0, 16) == [] and table[BOB].summary.log_length == 3
    table.heard(CAROL, 20.0)
    assert table.remove(BOB) is not None and table.remove(BOB) is None and not table


# Hello


def test_judging_a_hello() -> None:
    ours = told()
    assert judge(ours, told(version="2")) is None
    wrong = judge(ours, told(network=cid(b"m"), network_name="m"))
    assert wrong is not None and "'m'" in wrong and "'n'" in wrong and "\n" not in wrong
    old = judge(ours, told(protocol_version=9, version="7.1"))
    assert old is not None and "9" in old and "7.1" in old


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "boss"},
        {"network": b"short"},
        {"version": "v" * 200},
        {"profile": "two\nlines"},
        {"addrs": [ADDR] * (hello_addrs_max + 1)},
        {"addrs": ["x"]},
        {"addrs": ["/" + "x" * 500]},
        {"peers": [KnownPeer(peer_id=BOB, addrs=[])] * (hello_peers_max + 1)},
        {"peers": [KnownPeer(peer_id="nobody", addrs=[])]},
        {"summary": HelloSummary(log_id=b"x")},
        {"summary": HelloSummary(log_length=-1)},
    ],
)
def test_a_hello_beyond_the_limits(changes: dict[str, object]) -> None:
    check(told())
    with pytest.raises(RemoteProtocolError):
        check(told(**changes))


def test_10_000_hellos_of_garbage_give_one_error() -> None:
    chance, errors = random.Random(2), 0
    good = MESSAGES.encode(told())
    for case in range(10_000):
        data = bytearray(good)
        for _ in range(1 + case % 4):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if case % 5 == 0:
            data = data[: chance.randrange(len(data))]
        try:
            message = MESSAGES.decode(bytes(data))
            if isinstance(message, Hello):
                check(message)
        except RemoteProtocolError:
            errors += 1
    assert errors > 5_000


def test_the_largest_hello_that_we_make_fits() -> None:
    addrs = [f"/dns4/{'a' * 100}{i}.example/tcp/65535" for i in range(hello_addrs_max + 5)]
    hello = hello_of(
        NetworkId(cid(b"n")),
        "n",
        version="1",
        role="gpu",
        profile="p",
        summary=HelloSummary(),
        addrs=addrs,
        peers=[(peer(i), addrs) for i in range(hello_peers_max + 5)],
    )
    check(hello)
    assert len(MESSAGES.encode(hello)) > 60_000


# Queues, pace, memory of what was gossiped


@trio_test
async def test_a_full_receiver_loses_its_oldest_and_others_nothing() -> None:
    fanout = Fanout[int]()
    slow, quick = fanout.add(2), fanout.add(10)
    lost = sum(fanout.put(i) for i in range(5))
    assert lost == 3
    fanout.close()
    assert [i async for i in slow.receiver] == [3, 4]
    assert [i async for i in quick.receiver] == [0, 1, 2, 3, 4]


@trio_test
async def test_a_receiver_that_left_costs_nothing() -> None:
    fanout = Fanout[int]()
    with fanout.add(1).receiver:
        pass
    assert fanout.put(1) == 0 and fanout._queues == []
    await trio.lowlevel.checkpoint()


def test_pace() -> None:
    pace = Pace()
    assert sum(pace.allows(BOB, 0.0) for _ in range(2 * gossip_burst_max)) == gossip_burst_max
    assert pace.allows(CAROL, 0.0)
    assert sum(pace.allows(BOB, 1.0) for _ in range(1000)) == gossip_per_s_max
    large = gossip_bytes_per_token * 9
    assert sum(pace.allows(BOB, 2.0, large) for _ in range(100)) == gossip_per_s_max // 10


def test_recent() -> None:
    recent = Recent()
    assert recent.is_new("t", b"x", 0.0) and not recent.is_new("t", b"x", 1.0)
    assert recent.is_new("u", b"x", 1.0)
    assert recent.is_new("t", b"x", 500.0)
    for i in range(20_000):
        recent.is_new("t", b"%d" % i, 500.0)
    assert len(recent._seen) < 9_000
