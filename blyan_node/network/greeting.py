"""Hello on every connection, first and in both directions, and the signs of life after it.

The dialler asks, so each side has heard the other's hello before any other protocol of ours is
spoken: the listener when the request comes, the dialler when the reply does. Afterwards the dialler
shows every `still_every_s` that it is there, which gives both the round trip and tells both of a
dead link that TCP would not notice for many minutes.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from blyan_node.network.addressbook import AddressBook
from blyan_node.network.addresses import dialable_ones
from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.interface import NetworkConfig, Peer, PeerNetwork
from blyan_node.network.peers import PeerTable
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.hello import (
    MESSAGES,
    PROTOCOL,
    Hello,
    HelloSummary,
    Still,
    check,
    hello_of,
    judge,
)
from protocols.ids import PeerId
from protocols.limits import (
    hello_every_s,
    hello_s_max,
    misfits_said_max,
    silence_s_max,
    still_every_s,
)

log = logging.getLogger("blyan.network")

_PAUSE_S_MIN = 1.0

__all__ = ["MESSAGES", "PROTOCOL", "Greeted", "Greeting"]


@dataclass(frozen=True)
class Greeted:
    """What greeting tells the network, and asks it.

    Whether a peer is connected, allowed, and on this very machine.
    """

    connected: Callable[[PeerId], bool]
    allowed: Callable[[PeerId], bool]
    is_here: Callable[[PeerId], bool]
    passed: Callable[[Peer], None]
    misfit: Callable[[PeerId, str], None]
    learnt: Callable[[], None]


class Greeting:
    """Speaks `/blyan/hello/1` for one node."""

    def __init__(
        self,
        network: PeerNetwork,
        config: NetworkConfig,
        summary: Callable[[], HelloSummary],
        table: PeerTable,
        book: AddressBook,
    ) -> None:
        self._network = network
        self._config = config
        self._summary = summary
        self._table = table
        self._book = book
        self._said: set[tuple[PeerId, str]] = set()
        self.greeted: Greeted

    def ours(self) -> Hello:
        """Our hello at this moment."""
        return hello_of(
            self._config.network_id,
            self._config.network_name,
            version=self._config.version,
            role=self._config.role,
            profile=self._config.profile,
            summary=self._summary(),
            addrs=[addr.rpartition("/p2p/")[0] for addr in self._network.addrs],
            peers=[
                (peer.peer_id, [addr.rpartition("/p2p/")[0] for addr in peer.addrs])
                for peer in self._table.values()
            ],
        )

    async def answer(self, peer: PeerId, message: Hello | Still) -> Hello | Still:
        """The listener's side."""
        if isinstance(message, Hello):
            if not self.greeted.allowed(peer):
                self.say_once(peer, "wants to take part and is not among allowed_peers")
                self.greeted.misfit(peer, "not among allowed_peers")
                raise _not_allowed(peer)
            ours = self.ours()  # before we know the peer: it need not be told of itself
            if not self._table.greeted(peer, since=trio.current_time() - _PAUSE_S_MIN / 2):
                self._take(peer, message)
            return ours
        self._table.heard(peer, trio.current_time(), message.summary)
        if message.rtt_us:
            self._table.measured(peer, message.rtt_us / 1000)
        return self._still(0)

    async def begin(self, peer: PeerId) -> None:
        """The dialler's side: says hello; raises as `request` does if that fails."""
        began = trio.current_time()
        theirs = await self._network.request(peer, PROTOCOL, self.ours(), timeout_s=hello_s_max)
        if not isinstance(theirs, Hello):
            raise RemoteProtocolError("hello", "answered with something else")
        if self._take(peer, theirs):
            self._table.measured(peer, 1000 * (trio.current_time() - began))

    def _take(self, peer: PeerId, hello: Hello) -> bool:
        check(hello)
        if not self.greeted.connected(peer):  # it left meanwhile: nobody would ever say so
            return False
        why = judge(self.ours(), hello)
        if why is not None:
            self.say_once(peer, why)
            self.greeted.misfit(peer, f"it {why}")
            return False
        now = trio.current_time()
        here = self.greeted.is_here(peer)
        self._book.learn(peer, dialable_ones(hello.addrs, from_here=here), now)
        for known in hello.peers:
            if known.peer_id not in self._table:
                addrs = dialable_ones(known.addrs, from_here=here)
                self._book.hear(PeerId(known.peer_id), addrs, now, peer)
        if new := self._table.add(peer, hello, unix_s=time.time(), now=now):
            self.greeted.passed(new)
        self.greeted.learnt()
        return True

    def say_once(self, peer: PeerId, why: str) -> None:
        """Says why `peer` and we do not come together; the redials that follow are not news."""
        if (peer, why) in self._said or len(self._said) >= misfits_said_max:
            return
        self._said.add((peer, why))
        log.warning("peer %s %s", peer, why, extra={"peer": peer})

    async def keep(self, peer: PeerId) -> None:
        """The dialler's side, until the peer is gone."""
        last_hello, rtt_us, hello_is_due = trio.current_time(), 0, False
        await trio.sleep(_PAUSE_S_MIN)  # much may have changed since the hello was written
        while peer in self._table:
            began = trio.current_time()
            try:
                if hello_is_due or began - last_hello >= hello_every_s:
                    last_hello, hello_is_due = began, False
                    await self.begin(peer)
                    await self._pause()
                    continue
                still = self._still(rtt_us)
                reply = await self._network.request(peer, PROTOCOL, still, timeout_s=still_every_s)
            except (RequestTimeout, PeerGone):
                await self._pause()  # `silent` counts, and the loop ends with the connection
                continue
            except (PeerRefused, RemoteProtocolError) as error:
                self._network.penalise(peer, error)
                await self._pause()
                continue
            now = trio.current_time()
            rtt_us = int(1e6 * (now - began))
            self._table.measured(peer, 1000 * (now - began))
            if isinstance(reply, Still):
                self._table.heard(peer, now, reply.summary)
                hello_is_due = reply.peers != len(self._table)
            if not hello_is_due:
                await self._pause()

    async def _pause(self) -> None:
        """Until the next sign of life is due; soon, if we have a peer more or less."""
        before = len(self._table)
        for _ in range(int(still_every_s / _PAUSE_S_MIN)):
            await trio.sleep(_PAUSE_S_MIN)
            if len(self._table) != before:
                return

    def _still(self, rtt_us: int) -> Still:
        return Still(summary=self._summary(), rtt_us=rtt_us, peers=len(self._table))

    def silent(self) -> list[PeerId]:
        """The peers that have given no sign of life for too long."""
        return self._table.silent(trio.current_time(), silence_s_max)


def _not_allowed(peer: PeerId) -> Refused:
    """What somebody is told who is not among the network's peers."""
    return Refused(
        ErrorCode.NOT_ALLOWED,
        "this network lets in only the peers that it knows",
        f"{peer} is not among its allowed_peers",
        "ask its operators to add this id, which `blyan-node id` shows",
    )
