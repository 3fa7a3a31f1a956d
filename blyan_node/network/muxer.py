"""yamux with the bounds that py-libp2p 0.8.1 leaves out.

What the stock muxer does, and this one does not:

* an exception out of `start` ends the whole swarm; here it ends the connection;
* a cancelled `write` leaves half a record on the wire and kills the connection; here a record
  that was begun is finished, in at most `write_stall_s_max`;
* a peer may fill our memory by ignoring the window, or by opening streams without end;
* a connection on which nothing comes any more, not even answers to pings, stays open until TCP
  gives up, which takes a quarter of an hour: because the other process hangs, or because a link
  broke and its other end has long been back on a new connection. Here it ends after
  `pings_unanswered_max` pings.

`MuxerMultistream` ignores other classes under `/yamux/1.0.0`, so `GuardedMuxer` makes ours itself.
"""

import contextlib
import logging
import struct

import trio
from libp2p.abc import IMuxedConn, IMuxedStream, ISecureConn
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_SYN,
    TYPE_PING,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from protocols.limits import (
    ping_every_s,
    pings_unanswered_max,
    stream_window_bytes,
    streams_per_peer_max,
    unread_bytes_per_peer_max,
    write_stall_s_max,
)

log = logging.getLogger("blyan.network")

_PING = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, 1)


class WideStream(YamuxStream):
    """A stream whose window is wide from the first read on, and refilled by halves.

    The stock stream answers every read with a window update of its own, and a writer that meets a
    closed window looks again only every 10 ms.
    """

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        unread = len(self.conn.stream_buffers.get(self.stream_id, b""))
        room = stream_window_bytes - self.recv_window - unread
        if room >= stream_window_bytes // 2:
            self.recv_window += room
            await self.send_window_update(room)


class GuardedYamux(Yamux):
    """One connection's streams."""

    async def open_stream(self) -> YamuxStream:
        """A stream of ours; the stock class is named inside Yamux, so it is changed afterwards."""
        stream = await super().open_stream()
        stream.__class__ = WideStream
        return stream

    def __init__(self, secured_conn: ISecureConn, peer_id: ID, *, is_initiator: bool) -> None:
        super().__init__(secured_conn, peer_id, is_initiator=is_initiator, on_close=_nothing)
        self._heard = True
        read = secured_conn.read

        async def noted(n: int | None = None) -> bytes:
            data: bytes = await read(n)
            self._heard = True
            return data

        secured_conn.read = noted  # type: ignore[method-assign]

    async def _measure_rtt_loop(self) -> None:
        """Runs beside the reader: where the stock loop only measures, this one also judges.

        Everything that arrives is a sign of life. It counts its own pauses, so a node that was
        itself held up for a while blames nobody.
        """
        unanswered = 0
        while unanswered < pings_unanswered_max:
            self._heard = False
            with trio.move_on_after(ping_every_s):
                await self.event_shutting_down.wait()
                return
            if self._heard:
                unanswered = 0
                continue
            unanswered += 1
            with contextlib.suppress(Exception):  # whatever stops it, the reader sees the end
                await self._write_frame(_PING)
        log.info("peer %s answers no ping; disconnected", self.peer_id)
        await self.abort()

    async def start(self) -> None:
        """Serves the connection until it ends; nothing that a peer sends gets out of here."""
        try:
            await super().start()
        except Exception as error:  # py-libp2p's errors share no base, and a peer causes them all
            log.debug("connection to %s broke: %r", self.peer_id, error)
            await self._cleanup_on_error()
        finally:
            self.event_started.set()  # Swarm.add_conn waits for it, whatever happened
            with trio.CancelScope(shield=True):  # a swarm that stops forgets sockets half closed
                await self.abort()

    async def _write_frame(self, data: bytes) -> None:
        async with self._write_lock:
            with trio.CancelScope(shield=True) as scope:
                scope.deadline = trio.current_time() + write_stall_s_max
                await self.secured_conn.write(data)
        if scope.cancelled_caught:
            await self.abort()
            raise ConnectionClosedError(f"no bytes taken for {write_stall_s_max} s")

    async def abort(self) -> None:
        """Closes the socket under the muxer: the reader sees the end, and cleans up."""
        await self.secured_conn.close()

    async def _read_data_body(self, length: int) -> bytes:
        unread = sum(len(buffer) for buffer in self.stream_buffers.values())
        if unread + length > unread_bytes_per_peer_max:
            log.info("peer %s ignores its window; disconnected", self.peer_id)
            raise trio.TooSlowError  # the one error here that ends the connection
        return await super()._read_data_body(length)

    async def accept_stream(self) -> IMuxedStream:
        """The next stream that the peer opens; those beyond the limit are reset."""
        while True:
            stream = await super().accept_stream()
            ours = 1 if self.is_initiator else 0
            theirs = sum(1 for number in self.streams if number % 2 != ours)
            if theirs <= streams_per_peer_max:
                stream.__class__ = WideStream
                return stream
            await stream.reset()


class GuardedMuxer(MuxerMultistream):
    """Negotiates yamux and nothing else."""

    async def new_conn(self, conn: ISecureConn, peer_id: ID) -> IMuxedConn:
        """The muxed connection over `conn`."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxed = GuardedYamux(conn, peer_id, is_initiator=conn.is_initiator)
        return self._annotate_connection(muxed, conn, protocol)


async def _nothing() -> None:
    """Stands in until the swarm sets its own hook."""
