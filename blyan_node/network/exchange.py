"""Requests to peers and from peers: which channel, which handler, who may ask."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import trio
from libp2p.abc import INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID

from blyan_node.network.channels import AnsweringChannel, AskingChannel, Served, StreamEnded
from blyan_node.network.errors import PeerGone, PeerRefused, RequestTimeout
from blyan_node.network.host import GuardedHost
from blyan_node.network.interface import Counters, Handler
from blyan_node.network.traffic import Ledger
from protocols.errors import ErrorCode, LocalProtocolError, Refused, RemoteProtocolError
from protocols.ids import PeerId
from protocols.limits import channel_open_s_max, channels_per_protocol_max, handlers_per_peer_max
from protocols.wire import Messages

log = logging.getLogger("blyan.network")

Gate = Callable[[PeerId, str], Awaitable[bool]]
Blame = Callable[[PeerId, Exception], None]


@dataclass
class _Opening:
    """A channel that several requests may wait for; the outcome may be why there is none."""

    done: trio.Event = field(default_factory=trio.Event)
    outcome: AskingChannel | Refused | str = "this node stops"


@dataclass
class _Answering:
    """The streams of one protocol that one peer has open here, and the handlers they share."""

    channels: list[AnsweringChannel] = field(default_factory=list)
    room: trio.CapacityLimiter = field(
        default_factory=lambda: trio.CapacityLimiter(handlers_per_peer_max)
    )


class Exchange:
    """All channels of one node."""

    def __init__(self, host: GuardedHost, counters: Counters, gate: Gate, blame: Blame) -> None:
        self.ledger = Ledger()
        self._host = host
        self._counters = counters
        self._gate = gate
        self._blame = blame
        self._served: dict[str, Served] = {}
        self._asking: dict[tuple[PeerId, str], AskingChannel] = {}
        self._opening: dict[tuple[PeerId, str], _Opening] = {}
        self._answering: dict[tuple[PeerId, str], _Answering] = {}
        self._nursery: trio.Nursery | None = None

    def handle(self, protocol: str, messages: Messages, handler: Handler) -> None:
        """See `PeerNetwork.handle`."""
        if protocol in self._served or self._nursery is not None:
            raise LocalProtocolError(f"{protocol} is handled already, or too late")
        self._served[protocol] = Served(messages, handler)
        self.ledger.protocol(protocol)

    def serve(self, nursery: trio.Nursery) -> None:
        """From now on streams are accepted; their tasks run in `nursery`."""
        self._nursery = nursery
        for protocol in self._served:
            self._host.set_stream_handler(TProtocol(protocol), self._accept)

    async def request(
        self, peer: PeerId, protocol: str, messages: Messages, message: object, timeout_s: float
    ) -> Any:
        """See `PeerNetwork.request`."""
        data = messages.encode(message)
        self._counters.requests_sent += 1
        traffic = self.ledger.protocol(protocol)
        traffic.requests_out += 1
        try:
            with trio.fail_after(timeout_s):
                channel = await self._channel(peer, protocol)
                reply = await channel.ask(data)
            return messages.decode(reply)
        except trio.TooSlowError:
            traffic.failures["timeout"] += 1
            raise RequestTimeout(peer, protocol, timeout_s) from None
        except StreamEnded as ended:
            traffic.failures["gone"] += 1
            raise PeerGone(peer, str(ended)) from None
        except Refused as refused:
            traffic.failures["refused"] += 1
            raise PeerRefused(peer, refused) from None
        except RemoteProtocolError:
            traffic.failures["malformed"] += 1
            raise

    def messages(self, protocol: str) -> Messages:
        """The codec of a protocol that is handled here; asking and answering share it."""
        if protocol not in self._served:
            raise LocalProtocolError(f"{protocol} has no handler here, so no known messages")
        return self._served[protocol].messages

    def drop(self, peer: PeerId) -> None:
        """The last connection to `peer` is gone: fails what was asked of it, at once."""
        for key in [key for key in self._asking if key[0] == peer]:
            self._asking.pop(key).fail("the connection ended")
        self.ledger.left(peer)

    async def _channel(self, peer: PeerId, protocol: str) -> AskingChannel:
        key = (peer, protocol)
        channel = self._asking.get(key)
        if channel is not None and channel.usable:
            return channel
        opening = self._opening.get(key)
        if opening is None:
            assert self._nursery is not None
            opening = self._opening[key] = _Opening()
            self._nursery.start_soon(self._open_and_run, key, opening)
        await opening.done.wait()
        if isinstance(opening.outcome, AskingChannel):
            return opening.outcome
        if isinstance(opening.outcome, Refused):
            raise replace(opening.outcome)  # each waiter its own: exceptions carry a traceback
        raise StreamEnded(opening.outcome)

    async def _open_and_run(self, key: tuple[PeerId, str], opening: _Opening) -> None:
        """In a task of its own: an opening that is cancelled half-way would leak its stream."""
        try:
            stream = await self._open(*key)
            channel = AskingChannel(stream, self._counters, self.ledger.meters(*key))
        except StreamEnded as ended:
            opening.outcome = str(ended)
            return
        except Refused as refused:
            opening.outcome = refused
            return
        else:
            opening.outcome = self._asking[key] = channel
        finally:
            del self._opening[key]
            opening.done.set()
        await self._run_asking(key, channel)

    async def _open(self, peer: PeerId, protocol: str) -> INetStream:
        try:
            with trio.fail_after(channel_open_s_max):
                return await self._host.new_stream(ID.from_base58(peer), [TProtocol(protocol)])
        except trio.TooSlowError:
            raise StreamEnded(f"no stream within {channel_open_s_max} s") from None
        except Exception as error:  # py-libp2p's errors share no base
            if "protocol not supported" in _causes(error):
                why = f"{protocol} is not spoken there"
                raise Refused(ErrorCode.NOT_FOUND, why, "") from None
            raise StreamEnded(str(error)) from None

    async def _run_asking(self, key: tuple[PeerId, str], channel: AskingChannel) -> None:
        await channel.run()
        if self._asking.get(key) is channel:
            del self._asking[key]
        if channel.error is not None:
            self._blame(key[0], channel.error)

    async def _accept(self, stream: INetStream) -> None:
        """Runs in libp2p's handler task; the channel itself runs in our nursery."""
        peer, protocol = PeerId(str(stream.muxed_conn.peer_id)), str(stream.get_protocol())
        if self._nursery is None or not await self._gate(peer, protocol):
            await stream.reset()
            return
        beside = self._answering.setdefault((peer, protocol), _Answering())
        channel = AnsweringChannel(
            peer,
            stream,
            self._counters,
            self._served[protocol],
            beside.room,
            self._blame,
            self.ledger.meters(peer, protocol),
        )
        beside.channels.append(channel)
        ended = trio.Event()

        async def run() -> None:
            try:
                await channel.run()
            finally:
                beside.channels.remove(channel)
                if not beside.channels:
                    self._answering.pop((peer, protocol), None)
                ended.set()

        self._nursery.start_soon(run)
        if len(beside.channels) > channels_per_protocol_max:
            await beside.channels[0].close()  # the newest ones are those that the peer uses
        await ended.wait()


def _causes(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__
    return " ".join(texts)
