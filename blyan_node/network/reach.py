"""Looks at other nodes from outside for them, and has others look at us (`protocols.reach`)."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import trio
from libp2p.peer.id import ID
from libp2p.transport.tcp.tcp import TCP
from multiaddr import Multiaddr

from blyan_node.network.addresses import dialable, is_name
from blyan_node.network.host import GuardedSwarm
from blyan_node.network.interface import PeerNetwork
from blyan_node.network.names import resolved
from blyan_node.network.reasons import reason
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import (
    reach_addrs_max,
    reach_askers_max,
    reach_dial_s_max,
    reach_every_s,
    reach_per_host_max,
    request_s_max,
)
from protocols.reach import MESSAGES, PROTOCOL, Look, Seen, Tried, check_look, check_seen

log = logging.getLogger("blyan.network")


@dataclass(frozen=True)
class Looked:
    """What one peer saw; `offset_ms` is its clock less ours, good to `error_ms` either way."""

    peer: PeerId
    host: str
    offset_ms: int
    error_ms: int
    tried: tuple[Tried, ...]


class Reach:
    """Answers `/blyan/reach/1`, and asks."""

    def __init__(self, network: PeerNetwork, swarm: GuardedSwarm) -> None:
        self._network = network
        self._swarm = swarm
        self._asked: dict[PeerId, tuple[float, str]] = {}  # when, and from which host
        self.clock_ms = _clock_ms
        self._room = trio.CapacityLimiter(reach_askers_max)
        network.handle(PROTOCOL, MESSAGES, self.answer)

    async def answer(self, peer: PeerId, look: Look) -> Seen:
        """Tells `peer` how it looks from here; dials it at its own host and nobody else."""
        check_look(look)
        now = trio.current_time()
        host = self._swarm.host_of(ID.from_base58(peer)).partition("%")[0]
        self._asked = {p: one for p, one in self._asked.items() if now - one[0] < reach_every_s}
        beside = sum(bool(host) and where == host for _, where in self._asked.values())
        full = beside >= reach_per_host_max or not self._room.available_tokens
        if peer in self._asked or full:
            raise Refused(ErrorCode.BUSY, "not so often", "a peer looks once in a while", "wait")
        self._asked[peer] = (now, host)
        tried: list[Tried] = []
        async with self._room, trio.open_nursery() as nursery:
            for addr in await _at_host(look.addrs, host):
                nursery.start_soon(self._try, peer, addr, tried)
        tried.sort(key=lambda one: one.addr)
        return Seen(host=host, time_ms=self.clock_ms(), tried=tried)

    async def look(self, peer: PeerId, addrs: Sequence[str]) -> Looked:
        """Has `peer` look at us; raises as `PeerNetwork.request` does."""
        bare = [addr.rpartition("/p2p/")[0] or addr for addr in addrs][:reach_addrs_max]
        began, ours = trio.current_time(), self.clock_ms()
        seen = await self._network.request(
            peer, PROTOCOL, Look(addrs=bare), timeout_s=request_s_max
        )
        took_s = trio.current_time() - began
        if not isinstance(seen, Seen):
            raise RemoteProtocolError("reach", "answered with something else")
        check_seen(seen)
        offset, error = offset_of(seen.time_ms, ours, took_s)
        return Looked(peer, seen.host, offset, error, tuple(seen.tried))

    async def _try(self, peer: PeerId, addr: str, tried: list[Tried]) -> None:
        """A connection of its own, up to the proof of who answers; it is not kept."""
        raw, why = None, ""
        try:
            with trio.fail_after(reach_dial_s_max):
                raw = await TCP().dial(Multiaddr(addr))
                await self._swarm.upgrader.upgrade_security(raw, True, ID.from_base58(peer))
        except trio.TooSlowError:
            why = f"no answer within {reach_dial_s_max} s"
        except Exception as error:  # py-libp2p's errors share no base
            text = reason(error)[:300]
            why = text if text.isprintable() else "the other side answers with something else"
        finally:
            if raw is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                    await raw.close()
        tried.append(Tried(addr=addr, why=why))


def offset_of(theirs_ms: int, ours_ms: int, took_s: float) -> tuple[int, int]:
    """How far a clock is ahead of ours, and the error of that either way, in ms.

    It was read at some moment of the `took_s` that began when ours was; readings are cut to whole
    milliseconds.
    """
    half_ms = ceil(500 * took_s)
    return theirs_ms - (ours_ms + half_ms), half_ms + 1


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


async def _at_host(addrs: Sequence[str], host: str) -> list[str]:
    """The named addresses that are at `host`, else `host` at the port of the first of its kind.

    Who is seen over IPv6 and listens on IPv4 alone is not tried: it never said that it could be.
    """
    version = 6 if ":" in host else 4
    found: list[str] = []
    named = [addr for addr in addrs if dialable(addr)]
    with trio.move_on_after(reach_dial_s_max):  # for as long as all dials together
        for addr in named:
            try:
                plain = await resolved(addr)
            except OSError as error:
                log.debug("a name in %s is not known: %s", addr, error)
                continue
            found += [one for one in plain if one.split("/")[2] == host]
    like = [addr for addr in named if is_name(addr) or addr.startswith(f"/ip{version}/")]
    if not found and like and host:
        found = [f"/ip{version}/{host}/tcp/{like[0].split('/')[4]}"]
    return list(dict.fromkeys(found))[:reach_addrs_max]
