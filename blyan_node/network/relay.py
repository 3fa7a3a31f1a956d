"""Connections through a third node, for two that cannot dial each other.

A node behind a router that lets nobody in dials the others. Two such nodes have no connection, so
each of them asks a peer that both are connected with to pass bytes on. Noise and yamux run inside,
end to end: the node in between reads nothing and can only end it.

Participants: the asker, the relay, the target; the asker and the target are peers of the relay.
Sequence: the asker opens `/blyan/relay/1` and sends the target's peer id as one length byte and the
text; the relay opens `/blyan/relayed/1` to the target and sends the asker's id likewise; target and
relay answer with one byte (`Verdict`), and from then on the two streams are one.

Limits: `relay_circuits_max` circuits, of one asker `relay_circuits_per_peer_max`, each with
`relay_bytes_per_s_max`; a circuit never leads through another one.
"""

import enum
import logging
from collections import Counter
from collections.abc import Collection
from typing import Protocol

import trio
from libp2p.abc import IMuxedConn, INetStream
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from blyan_node.network.host import ENDINGS, GuardedHost, GuardedSwarm
from blyan_node.network.muxer import GuardedYamux
from blyan_node.network.reasons import reason
from protocols.errors import RemoteProtocolError
from protocols.ids import PeerId, key_of
from protocols.limits import (
    KIB,
    relay_bytes_per_s_max,
    relay_circuits_max,
    relay_circuits_per_peer_max,
    relay_open_s_max,
    relay_tries_max,
)

log = logging.getLogger("blyan.network")

HOP = TProtocol("/blyan/relay/1")
STOP = TProtocol("/blyan/relayed/1")
_PEER_ID_BYTES_MAX = 128
_PIECE_BYTES = 64 * KIB


class Verdict(enum.IntEnum):
    """What is answered before bytes flow."""

    OPEN = 0
    NOT_A_PEER = 1
    BUSY = 2
    REFUSED = 3


class Around(Protocol):
    """What relaying asks the network."""

    def knows(self, peer: PeerId) -> bool:
        """Whether `peer` is connected and passed hello."""

    def wants(self, peer: PeerId) -> bool:
        """Whether a connection with `peer` is wanted."""

    def nearest(self) -> Collection[PeerId]:
        """Our peers, those with the shortest round trip first."""


class RelayedConnection(RawConnection):
    """One end of a circuit; the address of the node in between is not that of the other end."""

    def __init__(self, stream: INetStream, initiator: bool) -> None:
        super().__init__(stream, initiator, ConnectionType.RELAYED)

    def get_remote_address(self) -> tuple[str, int] | None:
        """Nobody knows it here."""
        return None


class Relay:
    """All three parts, for one node."""

    def __init__(self, host: GuardedHost, swarm: GuardedSwarm, around: Around) -> None:
        self._host = host
        self._swarm = swarm
        self._around = around
        self._circuits: Counter[PeerId] = Counter()  # that we pass on, by asker
        self._relayed: set[IMuxedConn] = set()  # our own connections through others

    def serve(self) -> None:
        """From now on others are relayed, and may come through others."""
        self._host.set_stream_handler(HOP, self._pass_on)
        self._host.set_stream_handler(STOP, self._come_in)

    async def dial(self, target: PeerId) -> str | None:
        """Connects with `target` through a peer; None, or why that failed."""
        why = "no peer that could relay"
        direct = [peer for peer in self._around.nearest() if self._is_direct(peer)]
        for via in direct[:relay_tries_max]:
            try:
                with trio.fail_after(relay_open_s_max):
                    verdict = await self._dial_through(via, target)
            except trio.TooSlowError:
                why = f"through {via}: no answer in time"
            except Exception as error:  # py-libp2p's errors share no base
                why = f"through {via}: {reason(error)}"
            else:
                if verdict is Verdict.OPEN:
                    log.info("peer %s is reached through %s", target, via, extra={"peer": target})
                    return None
                why = f"through {via}: {verdict.name.lower().replace('_', ' ')}"
        return why

    def _is_direct(self, peer: PeerId) -> bool:
        conns = self._swarm.get_connections(ID.from_base58(peer))
        return any(conn.muxed_conn not in self._relayed for conn in conns)

    async def _dial_through(self, via: PeerId, target: PeerId) -> Verdict:
        stream = await self._host.new_stream(ID.from_base58(via), [HOP])
        done = False
        try:
            await stream.write(_name(target))
            verdict = await _verdict(stream)
            if verdict is Verdict.OPEN and stream.muxed_conn not in self._relayed:
                raw = RelayedConnection(stream, initiator=True)
                conn = await self._swarm.upgrade_outbound_raw_conn(raw, ID.from_base58(target))
                self._note(conn.muxed_conn)
                done = True
        finally:
            if not done:
                await stream.reset()
        return verdict

    async def _come_in(self, stream: INetStream) -> None:
        """The target's part: somebody comes in through a peer of ours."""
        via = PeerId(str(stream.muxed_conn.peer_id))
        muxed = None
        try:
            with trio.fail_after(relay_open_s_max):
                asker = await _read_name(stream)
                if not self._around.knows(via) or not self._around.wants(asker):
                    await stream.write(bytes((Verdict.REFUSED,)))
                    return
                await stream.write(bytes((Verdict.OPEN,)))
                raw = RelayedConnection(stream, initiator=False)
                where = Multiaddr(f"/p2p/{via}/p2p-circuit/p2p/{asker}")
                muxed = await self._swarm.upgrade_inbound_raw_conn(raw, where)
        finally:
            if muxed is None:
                await stream.reset()
        assert isinstance(muxed, GuardedYamux)
        self._note(muxed)
        await muxed.event_closed.wait()

    def _note(self, muxed: IMuxedConn) -> None:
        here = {conn.muxed_conn for conn in self._swarm.get_connections()}
        self._relayed = {conn for conn in self._relayed if conn in here} | {muxed}

    async def _pass_on(self, stream: INetStream) -> None:
        """The relay's part."""
        asker = PeerId(str(stream.muxed_conn.peer_id))
        try:
            with trio.fail_after(relay_open_s_max):
                target = await _read_name(stream)
                verdict, onward = await self._open(asker, target, stream.muxed_conn)
                await stream.write(bytes((verdict,)))
        except BaseException:
            await stream.reset()
            raise
        if onward is None:
            await stream.close()
            return
        self._circuits[asker] += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_copy, stream, onward, nursery.cancel_scope)
                nursery.start_soon(_copy, onward, stream, nursery.cancel_scope)
        finally:
            self._circuits[asker] -= 1
            self._circuits += Counter()  # without those that have none
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await stream.reset()
                await onward.reset()

    async def _open(
        self, asker: PeerId, target: PeerId, from_conn: IMuxedConn
    ) -> tuple[Verdict, INetStream | None]:
        if not self._around.knows(asker) or from_conn in self._relayed:
            return Verdict.REFUSED, None
        if not self._around.knows(target):
            return Verdict.NOT_A_PEER, None
        if (
            self._circuits.total() >= relay_circuits_max
            or self._circuits[asker] >= relay_circuits_per_peer_max
        ):
            return Verdict.BUSY, None
        onward = await self._host.new_stream(ID.from_base58(target), [STOP])
        if onward.muxed_conn in self._relayed:
            await onward.reset()
            return Verdict.NOT_A_PEER, None
        try:
            await onward.write(_name(asker))
            verdict = await _verdict(onward)
        except BaseException:
            await onward.reset()
            raise
        if verdict is not Verdict.OPEN:
            await onward.reset()
            return verdict, None
        return verdict, onward


async def _copy(source: INetStream, sink: INetStream, both: trio.CancelScope) -> None:
    """Passes bytes on at a bounded pace; when either stream ends, so does the circuit."""
    try:
        while data := await source.read(_PIECE_BYTES):
            await sink.write(data)
            await trio.sleep(len(data) / relay_bytes_per_s_max)
    except ENDINGS:
        pass
    both.cancel()


def _name(peer: PeerId) -> bytes:
    text = peer.encode()
    return bytes((len(text),)) + text


async def _read_name(stream: INetStream) -> PeerId:
    size = (await _exactly(stream, 1))[0]
    if size > _PEER_ID_BYTES_MAX:
        raise RemoteProtocolError("relay", f"a peer id of {size} bytes")
    try:
        text = (await _exactly(stream, size)).decode("ascii")
    except UnicodeDecodeError:
        raise RemoteProtocolError("relay", "a peer id that is no text") from None
    key_of(text)
    return PeerId(text)


async def _verdict(stream: INetStream) -> Verdict:
    number = (await _exactly(stream, 1))[0]
    try:
        return Verdict(number)
    except ValueError:
        raise RemoteProtocolError("relay", f"verdict {number}") from None


async def _exactly(stream: INetStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = await stream.read(size - len(data))
        if not part:
            raise trio.BrokenResourceError("the stream ended")
        data += part
    return data
