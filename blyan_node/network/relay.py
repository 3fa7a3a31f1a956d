"""Connections through a third node, for two that cannot dial each other.

A node behind a router that lets nobody in dials the others. Two such nodes have no connection, so
each of them asks a peer that both are connected with to pass bytes on. Noise and yamux run inside,
end to end: the node in between reads nothing and can only end it.

Participants: the asker, the relay, the target; the asker and the target are peers of the relay.
Sequence: the asker opens `/blyan/relay/1` and sends the target's peer id as one length byte and the
text; the relay opens `/blyan/relayed/1` to the target and sends the asker's id likewise; target and
relay answer with one byte (`Verdict`), and from then on the two streams are one.

Limits: `relay_circuits_max` circuits, of one asker `relay_circuits_per_peer_max`, counted from the
request on; `relay_bytes_per_s_max` each way for one, `relay_all_bytes_per_s_max` for all together.
A circuit on which nothing passes for `relay_silence_s_max` ends, and none leads through another.
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
    relay_all_bytes_per_s_max,
    relay_bytes_per_s_max,
    relay_circuits_max,
    relay_circuits_per_peer_max,
    relay_open_s_max,
    relay_silence_s_max,
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

    def penalise(self, peer: PeerId, error: Exception) -> None:
        """`peer` broke a rule."""


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
        self._free_at = 0.0  # when what was passed on so far is paid for

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
        return any(not _is_relayed(conn.muxed_conn) for conn in conns)

    async def _dial_through(self, via: PeerId, target: PeerId) -> Verdict:
        stream = await self._host.new_stream(ID.from_base58(via), [HOP])
        done = False
        try:
            await stream.write(_name(target))
            verdict = await _verdict(stream)
            if verdict is Verdict.OPEN and not _is_relayed(stream.muxed_conn):
                raw = RelayedConnection(stream, initiator=True)
                await self._swarm.upgrade_outbound_raw_conn(raw, ID.from_base58(target))
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
                muxed = await self._upgrade(stream, asker, via)
        finally:
            if muxed is None:
                await stream.reset()
        if muxed is not None:
            assert isinstance(muxed, GuardedYamux)
            await muxed.event_closed.wait()

    async def _upgrade(self, stream: INetStream, asker: PeerId, via: PeerId) -> IMuxedConn | None:
        """A connection over a circuit; None if what comes out of it is none."""
        raw = RelayedConnection(stream, initiator=False)
        where = Multiaddr(f"/p2p/{via}/p2p-circuit/p2p/{asker}")
        try:
            return await self._swarm.upgrade_inbound_raw_conn(raw, where)
        except Exception as error:  # py-libp2p's errors share no base; `via` is not to blame
            log.debug("%s through %s failed: %s", asker, via, reason(error))
            return None

    async def _pass_on(self, stream: INetStream) -> None:
        """The relay's part."""
        asker = PeerId(str(stream.muxed_conn.peer_id))
        with trio.fail_after(relay_open_s_max):
            target = await _read_name(stream)
        verdict = self._judge(asker, target, stream.muxed_conn)
        if verdict is not Verdict.OPEN:
            await stream.write(bytes((verdict,)))
            await stream.close()
            return
        self._circuits[asker] += 1  # from here on: else all who ask at once would get one
        try:
            await self._join(stream, asker, target)
        finally:
            self._circuits[asker] -= 1
            self._circuits += Counter()  # without those that have none

    def _judge(self, asker: PeerId, target: PeerId, from_conn: IMuxedConn) -> Verdict:
        if not self._around.knows(asker) or _is_relayed(from_conn) or asker == target:
            return Verdict.REFUSED
        if not self._around.knows(target) or not self._is_direct(target):
            return Verdict.NOT_A_PEER
        if (
            self._circuits.total() >= relay_circuits_max
            or self._circuits[asker] >= relay_circuits_per_peer_max
        ):
            return Verdict.BUSY
        return Verdict.OPEN

    async def _join(self, stream: INetStream, asker: PeerId, target: PeerId) -> None:
        verdict, onward = await self._ask(target, asker)
        try:
            await stream.write(bytes((verdict,)))
            if onward is None:
                await stream.close()
                return
            async with trio.open_nursery() as circuit:
                circuit.cancel_scope.deadline = trio.current_time() + relay_silence_s_max
                circuit.start_soon(self._copy, stream, onward, circuit.cancel_scope)
                circuit.start_soon(self._copy, onward, stream, circuit.cancel_scope)
        finally:
            if onward is not None:
                await _reset(stream, onward)

    async def _ask(self, target: PeerId, asker: PeerId) -> tuple[Verdict, INetStream | None]:
        """The target's verdict and stream; what it does wrong costs the asker nothing."""
        onward, verdict = None, Verdict.NOT_A_PEER
        try:
            with trio.fail_after(relay_open_s_max / 2):  # the asker waits too
                onward = await self._host.new_stream(ID.from_base58(target), [STOP])
                if not _is_relayed(onward.muxed_conn):
                    await onward.write(_name(asker))
                    verdict = await _verdict(onward)
        except RemoteProtocolError as error:
            self._around.penalise(target, error)
        except Exception as error:  # py-libp2p's errors share no base
            log.debug("%s is not reached for %s: %s", target, asker, reason(error))
        finally:
            if onward is not None and verdict is not Verdict.OPEN:
                await _reset(onward)
        return verdict, onward if verdict is Verdict.OPEN else None

    async def _copy(self, source: INetStream, sink: INetStream, circuit: trio.CancelScope) -> None:
        """Passes bytes on at a bounded pace; when either stream ends, so does the circuit."""
        try:
            while data := await source.read(_PIECE_BYTES):
                circuit.deadline = trio.current_time() + relay_silence_s_max
                await sink.write(data)
                await trio.sleep(self._price_s(len(data)))
        except ENDINGS:
            pass
        circuit.cancel()

    def _price_s(self, size: int) -> float:
        """How long whoever had `size` bytes passed on waits before more is taken."""
        now = trio.current_time()
        self._free_at = max(self._free_at, now) + size / relay_all_bytes_per_s_max
        return max(self._free_at - now, size / relay_bytes_per_s_max)


def _is_relayed(conn: IMuxedConn) -> bool:
    return bool(conn.get_connection_type() is ConnectionType.RELAYED)


async def _reset(*streams: INetStream) -> None:
    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
        for stream in streams:
            await stream.reset()


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
