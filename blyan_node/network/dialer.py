"""Dials whom the address book says is due, a few at a time, with the book's backoff."""

import logging
from collections.abc import Awaitable, Callable, Collection

import trio
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from blyan_node.network.addressbook import AddressBook
from blyan_node.network.addresses import is_name, leads_away
from blyan_node.network.host import GuardedSwarm
from blyan_node.network.names import resolved
from blyan_node.network.reasons import reason
from protocols.ids import PeerId
from protocols.limits import (
    dial_peer_s_max,
    dial_s_max,
    dials_at_once_max,
    hearsay_dials_at_once_max,
    hearsay_dials_per_teller_max,
)

log = logging.getLogger("blyan.network")

_LOOK_AT_LEAST_EVERY_S = 5.0


class Dialer:
    """Keeps the connections that the book wants."""

    def __init__(
        self,
        swarm: GuardedSwarm,
        book: AddressBook,
        connected: Callable[[], Collection[PeerId]],
        admits: Callable[[PeerId], bool],
        detour: Callable[[PeerId], Awaitable[str | None]],
    ) -> None:
        self._swarm = swarm
        self._book = book
        self._connected = connected
        self._admits = admits
        self._detour = detour
        self._dialling: dict[PeerId, PeerId | None] = {}  # and who told of the peer
        self._changed = trio.Event()

    def wake(self) -> None:
        """The book or the connections changed."""
        self._changed.set()

    async def run(self) -> None:
        """Dials for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                now = trio.current_time()
                busy = {*self._connected(), *self._dialling}
                for peer in self._book.due(now, busy):
                    if not self._admits(peer):
                        self._book.refused(peer, now, "this node does not want it")
                    elif self._may_dial(peer):
                        self._dialling[peer] = self._book.teller(peer)
                        nursery.start_soon(self._dial_due, peer)
                due = self._book.next_due(now, busy)
                wait = _LOOK_AT_LEAST_EVERY_S if due is None else due - trio.current_time()
                with trio.move_on_after(min(max(wait, 0.05), _LOOK_AT_LEAST_EVERY_S)):
                    await self._changed.wait()

    def _may_dial(self, peer: PeerId) -> bool:
        """Whether a dial of `peer` may begin now: whoever lies to us about others gets few."""
        if len(self._dialling) >= dials_at_once_max:
            return False
        if (teller := self._book.teller(peer)) is None:
            return True
        tellers = [told_by for told_by in self._dialling.values() if told_by is not None]
        return (
            len(tellers) < hearsay_dials_at_once_max
            and tellers.count(teller) < hearsay_dials_per_teller_max
        )

    async def _dial_due(self, peer: PeerId) -> None:
        try:
            why = await self.dial(peer)
            if why is not None:
                log.debug("dialling %s failed: %s", peer, why, extra={"peer": peer})
        finally:
            del self._dialling[peer]
            self.wake()

    async def dial(self, peer: PeerId) -> str | None:
        """Tries each address of `peer` in turn, then its detour; None, or why all failed.

        `Swarm.dial_peer` would try a single TCP address, wait 250 ms over it, and then refuse the
        peer for 60 s. A connection is no success yet: the book hears of one when hello has passed.
        """
        why = "no known address"
        deadline = trio.current_time() + dial_peer_s_max
        for addr in self._book.addrs(peer):
            try:
                with trio.fail_at(min(deadline, trio.current_time() + dial_s_max)):
                    await self._dial_first(await self._plain(peer, addr), ID.from_base58(peer))
            except trio.TooSlowError:
                why = f"{addr}: no answer in time"
            except Exception as error:  # py-libp2p's errors share no base
                why = f"{addr}: {reason(error)}"
            else:
                self._book.worked(peer, addr)
                return None
        if peer in self._connected() or await self._detour(peer) is None:
            return None
        if self._book.failed(peer, trio.current_time(), why):
            log.warning("bootstrap node %s is not reached: %s", peer, why, extra={"peer": peer})
        return why

    async def _plain(self, peer: PeerId, addr: str) -> list[str]:
        """The addresses that `addr` names; a name that somebody told us leads to no loopback."""
        found = await resolved(addr)
        if not is_name(addr) or self._book.vouched(peer, addr):
            return found
        if away := [one for one in found if leads_away(one)]:
            return away
        raise OSError("it is a name for this machine or its link")

    async def _dial_first(self, addrs: list[str], peer: ID) -> None:
        """Dials the first of a name's addresses that answers; raises what the last one did."""
        for addr in addrs[:-1]:
            try:
                await self._swarm.dial_addr(Multiaddr(addr), peer)
            except Exception as error:  # py-libp2p's errors share no base
                log.debug("dialling %s failed: %s", addr, error)
            else:
                return
        await self._swarm.dial_addr(Multiaddr(addrs[-1]), peer)
