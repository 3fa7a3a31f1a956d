"""Whom the dialer dials, how many at once and how soon again, over a swarm that only remembers."""

import random
from typing import Any, cast

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from blyan_node.network.addressbook import AddressBook
from blyan_node.network.dialer import Dialer
from blyan_node.testing.virtual_time import virtual_time_test
from protocols.ids import PeerId
from protocols.limits import (
    dial_peer_s_max,
    dials_at_once_max,
    hearsay_dials_at_once_max,
    hearsay_dials_per_teller_max,
    redial_s_max,
)
from protocols.signing import Identity

ADDR = "/ip4/192.0.2.7/tcp/4040"
HOLES = [f"/ip4/198.51.100.1/tcp/{port}" for port in range(1, 9)]  # nobody answers there


async def no_detour(_: PeerId) -> str | None:
    """Nobody relays."""
    return "no peer that could relay"


def peer(number: int) -> PeerId:
    return Identity.from_seed(number.to_bytes(32, "big")).peer_id


class Swarm:
    """Answers at `ADDR` and nowhere else; the rest takes for ever."""

    def __init__(self) -> None:
        self.dialling: dict[PeerId, int] = {}
        self.most = 0
        self.dialled: list[tuple[float, PeerId]] = []
        self.connected: set[PeerId] = set()

    async def dial_addr(self, addr: Multiaddr, peer_id: ID) -> None:
        peer = PeerId(str(peer_id))
        self.dialled.append((trio.current_time(), peer))
        self.dialling[peer] = self.dialling.get(peer, 0) + 1
        self.most = max(self.most, len(self.dialling))
        try:
            await (trio.sleep(0.25) if str(addr) == ADDR else trio.sleep_forever())
        finally:
            del self.dialling[peer]
        self.connected.add(peer)


def dialer(swarm: Swarm) -> tuple[AddressBook, Dialer]:
    book = AddressBook(peer(0), random.Random(1))
    return book, Dialer(cast(Any, swarm), book, lambda: swarm.connected, lambda p: True, no_detour)


@virtual_time_test
async def test_lies_about_others_do_not_keep_us_from_dialling_whom_we_know() -> None:
    swarm = Swarm()
    book, dialer_ = dialer(swarm)
    for i in range(200):
        book.hear(peer(100 + i), HOLES, 0.0, peer(1 + i % 4))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialer_.run)
        await trio.sleep(1)
        assert len(swarm.dialling) == hearsay_dials_at_once_max < dials_at_once_max
        tellers = [book.teller(p) for p in swarm.dialling]
        assert all(tellers.count(t) <= hearsay_dials_per_teller_max for t in tellers)
        known = [peer(1000 + i) for i in range(10)]
        for one in known:
            book.learn(one, [ADDR], 0.0)
        dialer_.wake()
        await trio.sleep(2)
        assert set(known) <= swarm.connected and swarm.most <= dials_at_once_max
        nursery.cancel_scope.cancel()


@virtual_time_test
async def test_all_addresses_of_a_peer_share_one_time_limit() -> None:
    swarm = Swarm()
    book, dialer_ = dialer(swarm)
    book.learn(peer(1), HOLES, 0.0)
    began = trio.current_time()
    assert await dialer_.dial(peer(1)) is not None
    assert trio.current_time() - began <= dial_peer_s_max


@virtual_time_test
async def test_a_peer_that_hangs_up_before_hello_is_dialled_ever_more_rarely() -> None:
    swarm = Swarm()
    book, dialer_ = dialer(swarm)
    book.add_bootstrap(peer(1), ADDR)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dialer_.run)
        end = trio.current_time() + 600
        while trio.current_time() < end:
            await trio.sleep(0.1)
            if swarm.connected:  # as `Network._greet` does when the connection ends
                swarm.connected.clear()
                book.failed(peer(1), trio.current_time())
                dialer_.wake()
        nursery.cancel_scope.cancel()
    assert 600 / (1.5 * redial_s_max + 1) <= len(swarm.dialled) < 60


@virtual_time_test
async def test_waiting_for_room_is_not_spinning() -> None:
    swarm = Swarm()
    book, dialer_ = dialer(swarm)
    asked = 0

    def due(now: float, busy: object) -> list[PeerId]:
        nonlocal asked
        asked += 1
        return AddressBook.due(book, now, cast(Any, busy))

    book.due = due  # type: ignore[assignment,method-assign]
    for i in range(20):
        book.learn(peer(1 + i), HOLES, 0.0)
    with trio.move_on_after(14):
        await dialer_.run()
    assert asked < 10
